"""The answers of `/v1/messages`, whole or as events.

https://docs.anthropic.com/en/api/messages and .../build-with-claude/streaming
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from typing_extensions import TypedDict

from jaxllm.engine.outputs import CompletionOutput, RequestOutput
from jaxllm.server.answer_blocks import Block, BlockEvent, BlockRow
from jaxllm.server.answer_form import AnswerForm
from jaxllm.server.errors import ApiError
from jaxllm.server.event_stream import event
from jaxllm.server.generation import Generation

StopReason = Literal["end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use"]
"""https://docs.anthropic.com/en/api/handling-stop-reasons"""


class MessageUsage(TypedDict):
    """Tokens; those found in the prefix cache are counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class TextContent(TypedDict):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingContent(TypedDict):
    """Reasoning."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseContent(TypedDict):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Content = TextContent | ThinkingContent | ToolUseContent


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


class MessageWriter:
    """Turns an output into an answer; an `Encoder` for one that is streamed."""

    def __init__(self, form: AnswerForm, generation: Generation, model: str) -> None:
        self._generation, self._model = generation, model
        self._reader = form.reader(generation.inputs[0].prompt)
        self._row = BlockRow()
        self._end: tuple[StopReason | None, str | None] = (None, None)

    def whole(self, sample: CompletionOutput) -> Message:
        """The answer."""
        for _ in self._read(sample):
            pass
        return self._message([_content(block) for block in self._row.blocks])

    def begin(self) -> Iterable[bytes]:
        """The empty message."""
        yield event({"type": "message_start", "message": self._message([])}, "message_start")

    def encode(self, prompt: int, output: RequestOutput) -> Iterable[bytes]:
        """What is new of its blocks."""
        for sample in output.outputs:
            for found in self._read(sample):
                yield from _events(found)

    def end(self) -> Iterable[bytes]:
        """Why it ended, and the usage."""
        delta = {"stop_reason": self._end[0], "stop_sequence": self._end[1]}
        data = {"type": "message_delta", "delta": delta, "usage": self._usage()}
        yield event(data, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def error(self, error: ApiError) -> Iterable[bytes]:
        """The error."""
        return (event(error.anthropic_body(), "error"),)

    def _read(self, sample: CompletionOutput) -> Iterator[BlockEvent]:
        finished = sample.finish_reason is not None
        for part in self._reader.read(sample.text, finished=finished):
            yield from self._row.add(part)
        if finished:
            yield from self._row.finish("completed")
        self._note_end(sample)

    def _note_end(self, sample: CompletionOutput) -> None:
        if sample.finish_reason == "length":
            input = self._generation.inputs[0]
            whole = input.max_tokens == input.params.max_tokens
            self._end = ("max_tokens" if whole else "model_context_window_exceeded", None)
        elif sample.finish_reason is not None and self._reader.called:
            self._end = ("tool_use", None)
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


def _content(block: Block) -> Content:
    """A block as a part of the answer."""
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind == "call":
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _input(block.text)}
    return {"type": "text", "text": block.text}


def _input(arguments: str) -> dict[str, Any]:
    """Arguments as an object, as this interface has it; {} for what is none, as when it was cut off."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _events(happened: BlockEvent) -> Iterator[bytes]:
    what, block, text = happened
    if what == "begin":
        data = {"type": "content_block_start", "index": block.index, "content_block": _content(block)}
        yield event(data, "content_block_start")
    elif what == "end":
        yield event({"type": "content_block_stop", "index": block.index}, "content_block_stop")
    elif text:
        deltas = {
            "text": {"type": "text_delta", "text": text},
            "reasoning": {"type": "thinking_delta", "thinking": text},
            "call": {"type": "input_json_delta", "partial_json": text},
        }
        data = {"type": "content_block_delta", "index": block.index, "delta": deltas[block.kind]}
        yield event(data, "content_block_delta")
