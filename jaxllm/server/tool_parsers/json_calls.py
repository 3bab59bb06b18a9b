"""Calls written as JSON objects: `{"name": "get_weather", "arguments": {"city": "Paris"}}`."""

import json
from collections.abc import Callable

from jaxllm.server.incremental import Steps
from jaxllm.server.tool_parsers.base import CallParser

ARGUMENT_KEYS = ("arguments", "parameters")


class JsonCallParser(CallParser):
    """Reads such objects. Arguments are given out as they arrive, as the model has written them."""

    def _read_call(self, *, checked: bool = False) -> Steps[bool]:
        """Reads an object, if one begins here.

        Args:
            checked: whether it is only a call if there is a tool of its name and if it has arguments. Without
                a marker in front, it may be an answer that happens to be JSON.

        Returns:
            Whether it was a call. If not, all that was read is held.
        """
        calls, name, arguments = self._calls, None, None
        if not (yield from self._hold_word("{")):
            return False
        while (key := (yield from self._read_key())) is not None:
            begun = self._calls > calls
            if key in ARGUMENT_KEYS and name and not begun:
                self._begin(name)
                yield from self._read_arguments()
            else:
                value = yield from self._read_value()
                if key in ARGUMENT_KEYS:
                    arguments = value
                elif key == "name" and not begun:
                    name = _text(value)
                    if not name or (checked and not self._is_tool(name)):
                        return False
                    if arguments is not None:
                        self._begin(name)
                        self._argue(_arguments(arguments))
            yield from self._skip_space()
            if self._char != ",":
                break
            yield from self._hold()
        if self._calls == calls and self._char == "}" and name and not checked:
            self._begin(name)
            self._argue("{}")
        if self._calls == calls:
            return False
        if (yield from self._hold_word("}")):
            self._held = ""
        return True

    def _read_list(self) -> Steps[None]:
        """Reads a list of such objects."""
        calls = self._calls
        yield from self._hold_word("[")
        yield from self._skip_space()
        while (yield from self._read_call()):
            yield from self._skip_space()
            if self._char != ",":
                break
            yield from self._hold()
            yield from self._skip_space()
        if self._calls > calls and (yield from self._hold_word("]")):
            self._held = ""

    def _read_key(self) -> Steps[str | None]:
        yield from self._skip_space()
        if self._char != '"':
            return None
        key = _text((yield from self._read_value()))
        yield from self._skip_space()
        return key if (yield from self._hold_word(":")) else None

    def _read_value(self) -> Steps[str]:
        """Reads a JSON value, all of which is held."""
        yield from self._skip_space()
        pieces: list[str] = []

        def keep(char: str) -> None:
            self._held += char
            pieces.append(char)

        yield from self._pass_value(keep)
        return "".join(pieces)

    def _read_arguments(self) -> Steps[None]:
        """Reads the arguments of the call that has begun."""
        yield from self._skip_space()
        self._held = ""
        if self._char == "{":
            yield from self._pass_value(self._argue)
        else:
            self._argue(_arguments((yield from self._read_value())))
            self._held = ""

    def _pass_value(self, give: Callable[[str], None]) -> Steps[None]:
        """Reads a JSON value, and gives its characters away. What is no JSON ends with the text."""
        depth, in_string, escaped = 0, False, False
        while char := self._char:
            if in_string:
                in_string = escaped or char != '"'
                escaped = char == "\\" and not escaped
                ends = not in_string and depth == 0
            else:
                if depth == 0 and (char in ",:]}" or char.isspace()):
                    return
                depth += (char in "{[") - (char in "}]")
                in_string = char == '"'
                ends = depth == 0 and char in "}]"
            give(char)
            yield
            if ends:
                return


def _text(value: str) -> str | None:
    """A JSON string's text; None if it is none."""
    try:
        found = json.loads(value)
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def _arguments(value: str) -> str:
    """Arguments as text: some models write the object into a string, or null for none."""
    return _text(value) or ("{}" if value in ("null", "") else value)
