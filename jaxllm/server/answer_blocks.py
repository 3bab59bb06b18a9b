"""An answer as a row of blocks: a text, some reasoning, or a call each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxllm.server.answer_parts import CallArguments, CallBegin, Part, Reasoning, Text

Kind = Literal["text", "reasoning", "call"]


@dataclass
class Block:
    """Pieces of an answer that belong together.

    Attributes:
        index: its place in the answer.
        text: of a call: its arguments, as JSON text.
        name: of the tool that is called.
        call_id: of the call.
        status: as `/v1/responses` names it.
    """

    kind: Kind
    index: int
    text: str = ""
    name: str = ""
    call_id: str = ""
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"


class BlockEvent(NamedTuple):
    """A block begins, goes on or ends."""

    what: Literal["begin", "more", "end"]
    block: Block
    text: str = ""
    """What is new, where it goes on."""


class BlockRow:
    """Puts pieces into blocks. Only the last block is open."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    @property
    def open(self) -> Block | None:
        """The block that has not ended."""
        last = self.blocks[-1] if self.blocks else None
        return last if last is not None and last.status == "in_progress" else None

    def add(self, part: Part) -> Iterator[BlockEvent]:
        """Adds a piece, and gives what happens to blocks."""
        match part:
            case Text(text):
                yield from self._ensure("text")
            case Reasoning(text):
                yield from self._ensure("reasoning")
            case CallBegin(_, name, id):
                yield from self.end()
                yield self._begin(Block("call", len(self.blocks), name=name, call_id=id))
                return
            case CallArguments(_, text):
                pass
        block = self.blocks[-1]
        block.text += text
        yield BlockEvent("more", block, text)

    def end(self, status: Literal["completed", "incomplete"] = "completed") -> Iterator[BlockEvent]:
        """Ends the open block, if there is one."""
        if (block := self.open) is not None:
            block.status = status
            yield BlockEvent("end", block)

    def finish(self, status: Literal["completed", "incomplete"]) -> Iterator[BlockEvent]:
        """Ends the row. One without a block gets an empty text."""
        if not self.blocks:
            yield from self._ensure("text")
        yield from self.end(status)

    def message(self) -> dict[str, Any]:
        """The answer as a message for a conversation."""

        def text(kind: Kind) -> str:
            return "".join(block.text for block in self.blocks if block.kind == kind)

        message: dict[str, Any] = {"role": "assistant", "content": text("text")}
        if reasoning := text("reasoning"):
            message["reasoning"] = reasoning
        calls = [block for block in self.blocks if block.kind == "call"]
        if calls:
            message["tool_calls"] = [call_message(call.call_id, call.name, call.text) for call in calls]
        return message

    def _ensure(self, kind: Kind) -> Iterator[BlockEvent]:
        if self.open is None or self.open.kind != kind:
            yield from self.end()
            yield self._begin(Block(kind, len(self.blocks)))

    def _begin(self, block: Block) -> BlockEvent:
        self.blocks.append(block)
        return BlockEvent("begin", block)


def call_message(id: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call as it stands in a conversation's message."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
