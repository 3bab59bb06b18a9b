"""Calls as Mistral's models write them, in the forms of their tokenizers' versions.

Source: https://github.com/mistralai/mistral-common (tokens/tokenizers/instruct.py)
"""

import json
import random
import string
from collections.abc import Callable
from typing import ClassVar

from jaxllm.server.incremental import Steps
from jaxllm.server.tool_parsers.json_calls import JsonCallParser

BEGIN, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = frozenset(string.ascii_letters + string.digits + "_-.")
_ID = string.ascii_letters + string.digits


class MistralToolParser(JsonCallParser):
    """Reads `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and from version 11 on
    `[TOOL_CALLS]name[ARGS]{...}` for each call, with or without `[ARGS]`.

    Calls get ids of 9 letters and digits: the models' templates take no others.
    """

    needs_special_tokens: ClassVar[bool] = True
    marker: ClassVar[str | None] = BEGIN

    @staticmethod
    def call_rule(name: str, arguments: str, word: Callable[[str], str]) -> str:
        """What follows `[TOOL_CALLS]`, in either form."""
        head = json.dumps(f'[{{"name": "{name}", "arguments": ')
        return f'(" "? {head} {arguments} "}}]" | "{name}" {word(ARGUMENTS)}? {arguments})'

    @staticmethod
    def new_id() -> str:
        """A new id for a call."""
        return "".join(random.choices(_ID, k=9))

    def _read(self) -> Steps[None]:
        while (yield from self._read_text(BEGIN)) is not None:
            yield from self._skip_space()
            if self._char == "[":
                yield from self._read_list()
            else:
                yield from self._read_named()
            self._release()

    def _read_named(self) -> Steps[None]:
        name = ""
        while self._char in _NAME:
            name += self._char
            yield from self._hold()
        while self._char == "[":  # an id of the model's own may come first; clients get ours
            if not (yield from self._read_tag()):
                return
        yield from self._skip_space()
        if name and self._char == "{":
            self._begin(name)
            yield from self._read_arguments()

    def _read_tag(self) -> Steps[bool]:
        yield from self._hold_word("[")
        if self._char == ARGUMENTS[1]:
            return (yield from self._hold_word(ARGUMENTS[1:]))
        found = yield from self._hold_word(CALL_ID[1:])
        while found and self._char in _NAME:
            yield from self._hold()
        return found
