"""The messages that `/v1/messages` takes, block by block, and what they are in a conversation.

https://docs.anthropic.com/en/api/messages and .../agents-and-tools/tool-use/implement-tool-use
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, model_validator

from jaxllm.server.answer_blocks import call_message
from jaxllm.server.fields import ApiModel, Refusals

CACHE = (({"type": "ephemeral"},), "prompts that begin alike share a cache by themselves")
"""How `cache_control` is refused, should it ask for something."""


class ContentBlock(ApiModel):
    """A part of a message."""

    refused: ClassVar[Refusals] = {
        "cache_control": CACHE,
        "citations": ((), "there are no citations"),
        "caller": (({"type": "direct"},), "only the model calls tools"),
    }


class TextBlock(ContentBlock):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(ContentBlock):
    """Reasoning of an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None
    """Anthropic signs reasoning; here there is nothing to check."""


class ToolUseBlock(ContentBlock):
    """A call of a tool, as an earlier answer had it."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(ContentBlock):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None

    def message(self) -> dict[str, Any]:
        """The result as a message; templates know no errors, so one says it in its text."""
        text = join_texts(self.content or "")
        content = f"Error: {text}" if self.is_error else text
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": content}


Block = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock,
    Discriminator("type"),
]
"""One part of a message. Others than these are refused."""


class Turn(ApiModel):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str | list[Block]

    @model_validator(mode="after")
    def _speaks_for_itself(self) -> Self:
        others = ToolResultBlock if self.role == "assistant" else (ToolUseBlock, ThinkingBlock)
        for block in self.content if isinstance(self.content, list) else ():
            if isinstance(block, others):
                raise ValueError(
                    f"a block of type {block.type!r} cannot stand in a message of the {self.role}"
                )
        return self

    def read(self) -> Iterable[dict[str, Any]]:
        """The messages that it stands for: results of calls are messages of their own."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        return self._answer(self.content) if self.role == "assistant" else self._question(self.content)

    def _answer(self, blocks: Sequence[Block]) -> Iterable[dict[str, Any]]:
        message: dict[str, Any] = {"role": "assistant", "content": join_texts(blocks)}
        if thoughts := [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]:
            message["reasoning"] = "\n".join(thoughts)
        if calls := [block for block in blocks if isinstance(block, ToolUseBlock)]:
            message["tool_calls"] = [call_message(call.id, call.name, call.input) for call in calls]
        yield message

    def _question(self, blocks: Sequence[Block]) -> Iterable[dict[str, Any]]:
        results = [block.message() for block in blocks if isinstance(block, ToolResultBlock)]
        yield from results
        if len(results) < len(blocks):
            yield {"role": self.role, "content": join_texts(blocks)}


def join_texts(content: str | Sequence[Block]) -> str:
    """The text of a message or of its blocks."""
    if isinstance(content, str):
        return content
    return "\n".join(block.text for block in content if isinstance(block, TextBlock))
