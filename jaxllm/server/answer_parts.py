"""What an answer is made of: text, reasoning and calls of tools, whole or as they arrive."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Some of what is said to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Some of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of a tool begins."""

    index: int
    """Its place among the answer's calls."""
    name: str
    id: str = ""
    """What the model calls it; most give no name, and then the server does."""


@dataclass(frozen=True, slots=True)
class CallArguments:
    """Some of a call's arguments, as JSON text."""

    index: int
    text: str


Part = Text | Reasoning | CallBegin | CallArguments
"""A piece of an answer. Pieces of one kind that follow each other belong together."""


@dataclass
class ToolCall:
    """A call of a tool; its arguments are JSON text as the model wrote it."""

    name: str
    id: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Answer:
    """An answer taken apart."""

    text: str
    reasoning: str
    calls: tuple[ToolCall, ...]


def join_parts(parts: Iterable[Part]) -> Answer:
    """All pieces of an answer together."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, ToolCall] = {}
    for part in parts:
        match part:
            case Text(text):
                texts.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallBegin(index, name, id):
                calls[index] = ToolCall(name, id)
            case CallArguments(index, text):
                calls[index].arguments += text
    return Answer("".join(texts), "".join(reasoning), tuple(calls.values()))


def merge_parts(parts: Iterable[Part]) -> list[Part]:
    """The same pieces, with those that continue each other in one."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        match last, part:
            case (Text(before), Text(text)):
                merged[-1] = Text(before + text)
            case (Reasoning(before), Reasoning(text)):
                merged[-1] = Reasoning(before + text)
            case (CallArguments(index, before), CallArguments(same, text)) if index == same:
                merged[-1] = CallArguments(index, before + text)
            case _:
                merged.append(part)
    return merged
