"""What `/v1/messages` is asked with: https://docs.anthropic.com/en/api/messages"""

from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from jaxllm.server.fields import ApiModel, Finite, Refusals
from jaxllm.server.message_blocks import CACHE, TextBlock, Turn, join_texts
from jaxllm.server.tools import Mode, Schema, Tool, ToolName, ToolUse


class MessageTool(ApiModel):
    """A tool, as `/v1/messages` has it: the client's own only."""

    refused: ClassVar[Refusals] = {
        "cache_control": CACHE,
        "defer_loading": ((), "all tools are shown to the model"),
        "eager_input_streaming": ((), "inputs are streamed as they arrive anyway"),
        "input_examples": ((), "put them into the description"),
        "allowed_callers": ((), "only the model calls tools"),
    }

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: Schema
    strict: bool | None = None

    def tool(self) -> Tool:
        """The tool, whatever the interface."""
        return Tool(self.name, self.description, self.input_schema, bool(self.strict))


class ToolChoice(ApiModel):
    """Whether tools are called."""

    type: Literal["none", "auto", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name: the tool's, with type 'tool' and only there")
        return self


class Thinking(ApiModel):
    """Whether the model's reasoning is given out; whether it reasons is up to it."""

    type: Literal["disabled", "adaptive"]


class Metadata(ApiModel):
    """Who asks."""

    user_id: str | None = None
    """Shown in the server's log."""


class JsonFormat(ApiModel):
    """A schema that the answer is held to."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(ApiModel):
    """What the answer is to be like: https://docs.anthropic.com/en/docs/build-with-claude/structured-outputs"""

    refused: ClassVar[Refusals] = {
        "effort": (("high",), "how long a model reasons is up to it; leave it out"),
        "task_budget": ((), "give max_tokens"),
    }

    format: JsonFormat | None = None


class CountTokensRequest(ApiModel):
    """A conversation."""

    refused: ClassVar[Refusals] = {
        "mcp_servers": ((), "no tools run on the server"),
        "container": ((), "no tools run on the server"),
        "context_management": ((), "shorten the conversation yourself"),
        "service_tier": (("auto", "standard_only"), "all requests are served alike"),
    }

    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    """The older name of `output_config.format`."""

    @model_validator(mode="after")
    def _make_sense_together(self) -> Self:
        _ = self.tool_use
        name, wanted = self.format
        if wanted is not None and self.output_format not in (None, wanted):
            raise ValueError("output_format: it is the older name of output_config.format; give one of them")
        if wanted is not None and self.continues:
            raise ValueError(
                f"{name}: the answer is held to the schema as a whole, and cannot go on from the assistant's "
                "message; end with one of the user"
            )
        return self

    @property
    def format(self) -> tuple[str, JsonFormat | None]:
        """What the answer is held to, after the parameter that says so."""
        wanted = None if self.output_config is None else self.output_config.format
        return ("output_config", wanted) if wanted is not None else ("output_format", self.output_format)

    @cached_property
    def tool_use(self) -> ToolUse:
        """What the answer may do with tools.

        Raises:
            ValueError: tools or a choice that make no sense.
        """
        modes: dict[str, Mode] = {"any": "required", "tool": "named", "none": "none", "auto": "auto"}
        choice = self.tool_choice
        return ToolUse.make(
            [tool.tool() for tool in self.tools or ()],
            None if choice is None else modes[choice.type],
            names=None if choice is None or choice.name is None else (choice.name,),
            parallel=None if choice is None else not choice.disable_parallel_tool_use,
        )

    @property
    def continues(self) -> bool:
        """Whether the answer goes on from the last message."""
        return self.messages[-1].role == "assistant"

    def turns(self) -> list[dict[str, Any]]:
        """The conversation as templates expect it."""
        turns = [message for turn in self.messages for message in turn.read()]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": join_texts(self.system)})
        return turns


class MessagesRequest(CountTokensRequest):
    """A conversation to be gone on with, and how."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Finite | None = None
    top_k: int | None = None
    top_p: Finite | None = None
    metadata: Metadata | None = None
