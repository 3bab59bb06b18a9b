"""What `/v1/responses` is asked with: https://platform.openai.com/docs/api-reference/responses/create"""

from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from jaxllm.server.fields import OF_CONVERSATIONS, ApiModel, Finite, Refusals, StreamOptions
from jaxllm.server.response_input import InputItem, conversation
from jaxllm.server.tools import FunctionDefinition, Tool, ToolUse, read_choice


class ResponseTool(FunctionDefinition):
    """A tool, as `/v1/responses` has it: functions only."""

    type: Literal["function"]

    def tool(self) -> Tool:
        """The tool, whatever the interface."""
        return Tool(self.name, self.description, self.parameters, bool(self.strict))


class TextFormat(ApiModel):
    """What the text is: any, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> Self:
        if (self.schema_ is not None and self.name is not None) != (self.type == "json_schema"):
            raise ValueError("schema: with type='json_schema' it must be given, and a name; else not")
        return self


class TextOptions(ApiModel):
    """The form of the text."""

    refused: ClassVar[Refusals] = {"verbosity": (("medium",), "ask for it in the prompt")}

    format: TextFormat | None = None


class ResponsesRequest(ApiModel):
    """What is to be answered, and how."""

    refused: ClassVar[Refusals] = OF_CONVERSATIONS | {
        "max_tool_calls": ((), "it counts calls of tools that run on the server, and none do"),
        "reasoning": (
            ({"effort": None}, {"effort": "none"}),
            "ask /v1/chat/completions, and set what the model's template reads with chat_template_kwargs",
        ),
        "prompt": ((), "prompts are not kept here; send the text"),
        "conversation": ((), "go on with previous_response_id"),
        "context_management": ((), "shorten the conversation yourself"),
        "truncation": (("disabled",), "shorten the conversation yourself, or let previous_response_id go"),
        "service_tier": (("auto", "default"), "all requests are served alike"),
        "prompt_cache_key": ((), "prompts that begin alike share a cache by themselves"),
        "background_options": ((), "answers in the background start as soon as there is room"),
    }

    model: str | None = None
    input: str | list[InputItem]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: Finite | None = None
    top_p: Finite | None = None
    top_logprobs: int | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    user: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.background and (self.stream or self.store is False):
            raise ValueError("background: an answer in the background is stored, and not streamed")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        if self.top_logprobs and not self.wants_logprobs:
            raise ValueError("top_logprobs: only with include=['message.output_text.logprobs']")
        if self.input == [] and self.previous_response_id is None:
            raise ValueError("input: there is none; give a text or at least one message")
        _ = self.tool_use
        return self

    @cached_property
    def tool_use(self) -> ToolUse:
        """What the answer may do with tools.

        Raises:
            ValueError: tools or a choice that make no sense.
        """
        mode, names = read_choice(self.tool_choice, "name")
        tools = [tool.tool() for tool in self.tools or ()]
        return ToolUse.make(tools, mode, names=names, parallel=self.parallel_tool_calls)

    @property
    def wants_logprobs(self) -> bool:
        """Whether tokens come with their logprobs."""
        return "message.output_text.logprobs" in (self.include or ())

    @property
    def format(self) -> dict[str, Any]:
        """The form of the text, as an answer repeats it."""
        wanted = self.text and self.text.format
        return {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)

    def messages(self) -> list[dict[str, Any]]:
        """The input as messages."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return conversation(self.input)
