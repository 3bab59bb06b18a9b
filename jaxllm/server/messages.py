"""`/v1/messages`: Anthropic's interface, https://docs.anthropic.com/en/api/messages"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.engine.inputs import Prompt
from jaxllm.engine.outputs import CompletionOutput, RequestOutput
from jaxllm.server.errors import ApiError, bad_value
from jaxllm.server.event_stream import EventStream, event
from jaxllm.server.fields import TOOLS, ApiModel, Finite, Refusals, refuse
from jaxllm.server.generation import Generation, Job, start, while_connected
from jaxllm.server.service import Served, Service

router = APIRouter()

StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


class TextBlock(ApiModel):
    """A part of a message. Others than text are refused."""

    refused: ClassVar[Refusals] = {
        "cache_control": (({"type": "ephemeral"},), "prompts that begin alike share a cache by themselves"),
        "citations": ((), "there are no citations"),
    }

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        return refuse(data, cls.refused)


class Turn(ApiModel):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str | list[TextBlock]


class Metadata(ApiModel):
    """Who asks."""

    user_id: str | None = None
    """Shown in the server's log."""


class CountTokensRequest(ApiModel):
    """A conversation."""

    refused: ClassVar[Refusals] = {
        "tools": ((), TOOLS),
        "tool_choice": (({"type": "none"}, {"type": "auto"}), TOOLS),
        "thinking": (({"type": "disabled"},), "reasoning is a part of the text, and comes with it"),
        "mcp_servers": ((), "there are no tools"),
        "container": ((), "there are no tools"),
        "context_management": ((), "shorten the conversation yourself"),
        "output_config": ((), "outputs are held to a schema by OpenAI's interfaces: /v1/chat/completions"),
        "output_format": ((), "outputs are held to a schema by OpenAI's interfaces: /v1/chat/completions"),
        "service_tier": (("auto", "standard_only"), "all requests are served alike"),
    }

    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    system: str | list[TextBlock] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        return refuse(data, cls.refused)

    async def render(self, engine: AsyncEngine, service: Service) -> Prompt:
        """The conversation as a prompt; an assistant's message at the end is gone on with."""
        turns = [{"role": turn.role, "content": _text(turn.content)} for turn in self.messages]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": _text(self.system)})
        continues = self.messages[-1].role == "assistant"
        return await engine.render_chat(
            turns,
            chat_template=service.chat_template,
            add_generation_prompt=not continues,
            continue_final_message=continues,
        )


class MessagesRequest(CountTokensRequest):
    """A conversation to be gone on with, and how."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Finite | None = None
    top_k: int | None = None
    top_p: Finite | None = None
    metadata: Metadata | None = None


class MessageUsage(TypedDict):
    """Tokens; those found in the prefix cache are counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Content(TypedDict):
    """A part of the answer."""

    type: Literal["text"]
    text: str


class Message(TypedDict):
    """The answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Content]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    """Tokens of a prompt."""

    input_tokens: int


@router.post("/v1/messages", response_model=Message)
async def create_message(body: MessagesRequest, request: Request, service: Served) -> Response:
    """Answers a conversation."""
    model = service.model_name(body.model)
    work = start(service, request, _job(body, service), None)
    generation = await while_connected(request.receive, work)
    writer = MessageWriter(generation, model)
    if body.stream:
        return EventStream(generation, writer, service.config.limits.sse_keep_alive)
    async with generation:
        [output] = await while_connected(request.receive, generation.collect())
        request.state.usage = generation.usage()
        return JSONResponse(writer.whole(output.outputs[0]))


@router.post("/v1/messages/count_tokens", response_model=TokenCount)
async def count_tokens(body: CountTokensRequest, service: Served) -> TokenCount:
    """Tokens of a conversation's prompt."""
    service.model_name(body.model)
    try:
        prompt: Any = await body.render(service.engine, service)
    except (TypeError, ValueError) as error:
        raise bad_value(error, CountTokensRequest.model_fields, {}) from error
    return {"input_tokens": len(prompt["prompt_token_ids"])}


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _job(body: MessagesRequest, service: Service) -> Job:
    async def render(engine: AsyncEngine) -> Sequence[Prompt]:
        return [await body.render(engine, service)]

    given = {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
    }
    return Job(
        prompts=render,
        num_prompts=1,
        params={name: value for name, value in given.items() if value is not None},
        stream=bool(body.stream),
        input_options={},
        known=frozenset(MessagesRequest.model_fields),
        rename={"prompt": "messages", "prompt_token_ids": "messages", "stop": "stop_sequences"},
        user=body.metadata.user_id if body.metadata else None,
    )


class MessageWriter:
    """Turns an output into an answer; an `Encoder` for one that is streamed."""

    def __init__(self, generation: Generation, model: str) -> None:
        self._generation, self._model = generation, model
        self._end: tuple[StopReason | None, str | None] = (None, None)

    def whole(self, sample: CompletionOutput) -> Message:
        """The answer."""
        self._note_end(sample)
        return self._message([{"type": "text", "text": sample.text}])

    def begin(self) -> Iterable[bytes]:
        """The empty message, and its only part."""
        yield event({"type": "message_start", "message": self._message([])}, "message_start")
        part = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        yield event(part, "content_block_start")

    def encode(self, prompt: int, output: RequestOutput) -> Iterable[bytes]:
        """What is new of the text."""
        for sample in output.outputs:
            self._note_end(sample)
            if sample.text:
                delta = {"type": "text_delta", "text": sample.text}
                data = {"type": "content_block_delta", "index": 0, "delta": delta}
                yield event(data, "content_block_delta")

    def end(self) -> Iterable[bytes]:
        """Why it ended, and the usage."""
        yield event({"type": "content_block_stop", "index": 0}, "content_block_stop")
        delta = {"stop_reason": self._end[0], "stop_sequence": self._end[1]}
        data = {"type": "message_delta", "delta": delta, "usage": self._usage()}
        yield event(data, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def error(self, error: ApiError) -> Iterable[bytes]:
        """The error."""
        return (event(error.anthropic_body(), "error"),)

    def _note_end(self, sample: CompletionOutput) -> None:
        if sample.finish_reason == "length":
            self._end = ("max_tokens", None)
        elif isinstance(sample.stop_reason, str):
            self._end = ("stop_sequence", sample.stop_reason)
        elif sample.finish_reason is not None:
            self._end = ("end_turn", None)

    def _message(self, content: list[Content]) -> Message:
        return {
            "id": f"msg_{self._generation.id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": self._end[0],
            "stop_sequence": self._end[1],
            "usage": self._usage(),
        }

    def _usage(self) -> MessageUsage:
        usage = self._generation.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }
