"""What a parser of reasoning is, and what the built-in ones have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal

from jaxllm.server.answer_parts import Part, Reasoning, Text
from jaxllm.server.incremental import IncrementalParser, MarkerSearch, Steps

Beginning = Literal["reasoning", "either", "text"]
"""What an answer begins with."""


class ReasoningParser(ABC):
    """Parts a model's reasoning from its answer. There is one for each answer.

    Args:
        prompt: text that the answer follows.
        continued: the part of the answer that stands in the prompt, if the answer goes on from it.
    """

    begin: ClassVar[str]
    """What the model writes before its reasoning."""
    end: ClassVar[str]
    """What it writes after it."""

    @abstractmethod
    def __init__(self, prompt: str = "", continued: str = "") -> None: ...

    @property
    @abstractmethod
    def beginning(self) -> Beginning:
        """What the answer begins with, as far as the prompt tells."""

    @abstractmethod
    def feed(self, text: str) -> Iterable[Part]:
        """Reads on, and gives what is known by now: `Reasoning` and `Text`."""

    @abstractmethod
    def finish(self) -> Iterable[Part]:
        """Ends the text, and gives the rest."""


def count_reasoning(parser: ReasoningParser, tokens: Iterable[bytes]) -> int:
    """How many of an answer's tokens are reasoning, its marks included.

    Args:
        parser: one that the answer was, or could be, read with.
        tokens: what each token writes.
    """
    begin, end = parser.begin.encode(), parser.end.encode()
    head = tail = b""
    count = 0
    for token in tokens:
        head += token if len(head.lstrip()) < len(begin) else b""
        tail = (tail + token)[-len(token) - len(end) :]
        count += 1
        if end in tail:
            break
    opened = head.lstrip().startswith(begin)
    return count if parser.beginning == "reasoning" or (parser.beginning == "either" and opened) else 0


class ThinkParser(IncrementalParser, ReasoningParser):
    """Reads reasoning between `<think>` and `</think>`, at the beginning of the answer.

    White space around reasoning is dropped. Reasoning that does not end is all there is of the answer.

    Args:
        prompt: text that the answer follows. Some templates end it with `<think>`, or, to keep the model from
            reasoning, with `</think>`.
        continued: the part of the answer that stands in the prompt, if the answer goes on from it.
    """

    begin: ClassVar[str] = "<think>"
    end: ClassVar[str] = "</think>"
    default: ClassVar[Beginning]
    """What the answer begins with if the prompt does not tell."""

    def __init__(self, prompt: str = "", continued: str = "") -> None:
        super().__init__()
        opened, closed = continued.rfind(self.begin), continued.rfind(self.end)
        prompt = prompt.rstrip()
        if opened > closed or prompt.endswith(self.begin):
            self._beginning: Beginning = "reasoning"
        elif closed >= 0 or prompt.endswith(self.end):
            self._beginning = "text"
        else:
            self._beginning = self.default

    @property
    def beginning(self) -> Beginning:
        """What the answer begins with, as far as the prompt tells."""
        return self._beginning

    def _read(self) -> Steps[None]:
        held = ""
        if self._beginning != "text":
            while self._char and self.begin.startswith((held + self._char).lstrip()):
                held += self._char
                yield
            opened = held.lstrip() == self.begin
            if opened or self._beginning == "reasoning":
                yield from self._read_reasoning("" if opened else held)
                held = ""
                while self._char and self._char.isspace():
                    yield
        self._give(Text(held))
        while self._char:
            self._give(Text(self._char))
            yield

    def _read_reasoning(self, text: str) -> Steps[None]:
        """Reads reasoning up to its end, `text` first."""
        search, marker = MarkerSearch([self.end]), None
        said = False
        while marker is None and self._char:
            more, marker = search.feed(self._char)
            text += more
            spoken = text.rstrip() if said else text.strip()
            if spoken:
                self._give(Reasoning(spoken))
                text, said = text[len(text.rstrip()) :], True
            yield
        if marker is None:
            rest = (text + search.held).rstrip()
            self._give(Reasoning(rest if said else rest.lstrip()))

    def _give(self, part: Text | Reasoning) -> None:
        if part.text:
            self._found.append(part)
