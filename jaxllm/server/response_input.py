"""The items that `/v1/responses` takes as its input, and the conversation that they are.

https://platform.openai.com/docs/api-reference/responses/create#responses-create-input
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from jaxllm.server.answer_blocks import call_message
from jaxllm.server.fields import ApiModel


class TextPart(ApiModel):
    """A part of a message. Others than text are refused."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None
    """An earlier answer's, which may come back with it; nothing is made of them."""


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class Item(ApiModel):
    """What all items may have because an answer's had it; nothing is made of it."""

    id: str | None = None
    status: str | None = None


class InputMessage(Item):
    """One message of the input; an answer's `output` can be given back as it is."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[TextPart]


class CallItem(Item):
    """A call of a tool, as an earlier answer had it."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(Item):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]


class ReasoningPart(ApiModel):
    """Some reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Item):
    """Reasoning of an earlier answer."""

    type: Literal["reasoning"]
    content: list[ReasoningPart] | None = None
    summary: Annotated[list[Any], Field(max_length=0)] | None = None


def _kind(item: Any) -> str | None:
    return (item.get("type") or "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]
"""One item of the input."""


def conversation(items: Iterable[InputItem]) -> list[dict[str, Any]]:
    """The items as messages: reasoning, text and calls that follow each other are one answer."""
    messages: list[dict[str, Any]] = []
    answer: dict[str, Any] | None = None
    for item in items:
        match item:
            case InputMessage(role="assistant"):
                answer = _answer(messages, answer, "content", "tool_calls")
                answer["content"] = _text(item.content)
            case ReasoningItem():
                answer = _answer(messages, answer, "reasoning", "content", "tool_calls")
                answer["reasoning"] = "".join(part.text for part in item.content or ())
            case CallItem():
                answer = _answer(messages, answer)
                calls = answer.setdefault("tool_calls", [])
                calls.append(call_message(item.call_id, item.name, item.arguments))
            case CallOutputItem():
                answer = None
                content = _text(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
            case InputMessage():
                answer = None
                messages.append({"role": item.role, "content": _text(item.content)})
    return messages


def _answer(messages: list[dict[str, Any]], answer: dict[str, Any] | None, *later: str) -> dict[str, Any]:
    """The answer to be added to: a new one if it has what can only come later."""
    if answer is None or any(name in answer for name in later):
        answer = {"role": "assistant"}
        messages.append(answer)
    return answer
