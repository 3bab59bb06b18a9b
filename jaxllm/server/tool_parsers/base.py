"""What a parser of tool calls is, and what the built-in ones have in common."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

from jaxllm.server.answer_parts import CallArguments, CallBegin, Part, Text
from jaxllm.server.incremental import IncrementalParser, MarkerSearch, Steps


class ToolParser(ABC):
    """Reads calls of tools from what a model writes. There is one for each answer.

    Args:
        tools: names of the tools that may be called; without any, every name is taken for a tool's.
    """

    needs_special_tokens: ClassVar[bool] = False
    """Whether calls are marked by special tokens, which then have to be in the text."""
    marker: ClassVar[str | None] = None
    """What every call begins with. With it and `call_rule`, strict tools' calls are held to their schemas."""

    @abstractmethod
    def __init__(self, tools: Iterable[str] = ()) -> None: ...

    @abstractmethod
    def feed(self, text: str) -> Iterable[Part]:
        """Reads on, and gives what is known by now: text, calls, and pieces of their arguments."""

    @abstractmethod
    def finish(self) -> Iterable[Part]:
        """Ends the text, and gives the rest."""

    @staticmethod
    def new_id() -> str:
        """A new id for a call, in the form that the models' templates expect; here as OpenAI's look."""
        return f"call_{uuid.uuid4().hex[:24]}"

    @staticmethod
    def call_rule(name: str, arguments: str, word: Callable[[str], str]) -> str:
        """What follows the marker in a call, as an expression of Lark.

        Args:
            name: the tool's.
            arguments: the rule of its arguments.
            word: makes a terminal of a word, which may be a special token.

        Raises:
            NotImplementedError: there is no such rule.
        """
        raise NotImplementedError


class CallParser(IncrementalParser, ToolParser):
    """A parser of tool calls that reads a character at a time.

    Nothing of the text is lost: what looks like a call and is none is given out as text. White space around
    calls is dropped, unless there is text on both sides.
    """

    def __init__(self, tools: Iterable[str] = ()) -> None:
        super().__init__()
        self._tools = frozenset(tools)
        self._held = ""
        """What was read since something began that may be a call."""
        self._space = ""
        self._calls = 0
        self._spoken = self._after_call = False

    def _is_tool(self, name: str) -> bool:
        return not self._tools or name in self._tools

    def _hold(self) -> Steps[None]:
        """Goes on to the next character, and keeps this one until it is known what it belongs to."""
        self._held += self._char
        yield

    def _skip_space(self) -> Steps[None]:
        while self._char and self._char.isspace():
            yield from self._hold()

    def _hold_word(self, word: str) -> Steps[bool]:
        """Reads a word that must come now."""
        for char in word:
            if self._char != char:
                return False
            yield from self._hold()
        return True

    def _release(self) -> None:
        """What was held is text after all."""
        held, self._held = self._held, ""
        self._say(held)

    def _say(self, text: str) -> None:
        text = self._space + text
        spoken = text.rstrip()
        self._space = text[len(spoken) :]
        if spoken:
            if self._after_call and not self._spoken:
                spoken = spoken.lstrip()
            self._found.append(Text(spoken))
            self._spoken, self._after_call = True, False

    def _read_text(self, *markers: str) -> Steps[str | None]:
        """Gives out text up to a marker, which is then held.

        Returns:
            The marker; None at the end of the text.
        """
        search = MarkerSearch(markers)
        while self._char:
            text, marker = search.feed(self._char)
            self._say(text)
            if marker is not None:
                self._held = marker
                yield
                return marker
            yield
        self._say(search.held)
        self._end()
        return None

    def _end(self) -> None:
        """The text has ended: white space at its end is text, unless it follows a call."""
        if self._space and not self._after_call:
            self._found.append(Text(self._space))
        self._space = ""

    def _begin(self, name: str) -> None:
        self._held = ""
        self._after_call = True
        self._found.append(CallBegin(self._calls, name))
        self._calls += 1

    def _argue(self, text: str) -> None:
        """Adds to the arguments of the call that has begun last."""
        self._found.append(CallArguments(self._calls - 1, text))
