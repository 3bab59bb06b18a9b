"""Calls as Hermes 2 Pro and later write them, and Qwen 2.5, Qwen 3 and QwQ.

Source: https://github.com/NousResearch/Hermes-Function-Calling
"""

import json
from collections.abc import Callable
from typing import ClassVar

from jaxllm.server.incremental import Steps
from jaxllm.server.tool_parsers.json_calls import JsonCallParser

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesToolParser(JsonCallParser):
    """Reads `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number, and text between."""

    needs_special_tokens: ClassVar[bool] = True
    marker: ClassVar[str | None] = BEGIN

    @staticmethod
    def call_rule(name: str, arguments: str, word: Callable[[str], str]) -> str:
        """What follows `<tool_call>`."""
        head = json.dumps(f'{{"name": "{name}", "arguments": ')
        return rf'/\n?/ {head} {arguments} "}}" /\n?/ {word(END)}'

    def _read(self) -> Steps[None]:
        while (yield from self._read_text(BEGIN)) is not None:
            yield from self._skip_space()
            if (yield from self._read_call()):
                yield from self._skip_space()
                if (yield from self._hold_word(END)):
                    self._held = ""
            self._release()
