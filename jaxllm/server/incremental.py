"""Parsers of text that is not all there yet."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import TypeVar

from jaxllm.engine.stops import StopMatcher
from jaxllm.server.answer_parts import Part, merge_parts

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A part of a parser: it yields where it needs the next character, and returns what it found."""


class IncrementalParser(ABC):
    """Reads a text as it arrives and gives out what it is made of.

    A subclass writes `_read` as if the text were all there: `self._char` is the character at hand ("" at the
    end), and `yield` goes on to the next. As it sees one character at a time, what comes out does not depend
    on how the text was cut.
    """

    def __init__(self) -> None:
        self._char = ""
        self._found: list[Part] = []
        self._steps = self._read()

    @abstractmethod
    def _read(self) -> Steps[None]:
        """Reads the text to its end, with what it finds added to `self._found`."""

    def feed(self, text: str) -> list[Part]:
        """Reads on.

        Returns:
            What is known by now and was not given out before.
        """
        for self._char in text:
            next(self._steps)
        return self._take()

    def finish(self) -> list[Part]:
        """Ends the text.

        Returns:
            The rest: what was held back because it might have become something else.
        """
        self._char = ""
        for _ in self._steps:
            pass
        return self._take()

    def _take(self) -> list[Part]:
        found, self._found = merge_parts(self._found), []
        return found


class MarkerSearch:
    """Reads up to one of several markers, a character at a time."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._matcher = StopMatcher(markers)
        self._held = ""

    def feed(self, char: str) -> tuple[str, str | None]:
        """Reads a character.

        Returns:
            The text that is known to come before a marker and was not given out yet; and the marker, if the
            character completes one.
        """
        match = self._matcher.feed(char)
        held = self._held + char
        size = self._matcher.partial if match is None else len(match.stop)
        text, self._held = held[: len(held) - size], held[len(held) - size :]
        return text, None if match is None else match.stop

    @property
    def held(self) -> str:
        """What may yet become a marker."""
        return self._held
