"""Calls written in Python, as Llama 3.2's small models, ToolACE and others do.

Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3_2/text_prompt_format.md
"""

import ast
import json
import warnings
from typing import Any

from jaxllm.server.incremental import Steps
from jaxllm.server.tool_parsers.base import CallParser

_JSON_NAMES = {"true": True, "false": False, "null": None}


class PythonicToolParser(CallParser):
    """Reads `[get_weather(city="Paris"), get_time(zone="CET")]` at the beginning of the answer.

    A call is given out once it is complete: its arguments are literals of Python (`true`, `false` and `null`
    are taken as well), read by `ast` and never run. A list whose first item is no call of a tool is text.
    """

    def _read(self) -> Steps[None]:
        yield from self._skip_space()
        if self._char == "[":
            yield from self._hold()
            yield from self._read_calls()
        self._release()
        yield from self._read_text()

    def _read_calls(self) -> Steps[None]:
        while True:
            yield from self._skip_space()
            found = _call((yield from self._read_source()))
            if found is None or not self._is_tool(found[0]):
                return
            self._begin(found[0])
            self._argue(found[1])
            yield from self._skip_space()
            if self._char != ",":
                break
            yield from self._hold()
        if (yield from self._hold_word("]")):
            self._held = ""

    def _read_source(self) -> Steps[str]:
        """Reads `name(...)` up to its closing bracket, or as far as it looks like that."""
        source = ""
        while self._char.isidentifier() or (source and (self._char.isalnum() or self._char == ".")):
            source += self._char
            yield from self._hold()
        depth, quote, escaped = 0, "", False
        while self._char and (depth or self._char == "("):
            char = self._char
            if quote:
                quote = quote if escaped or char != quote else ""
                escaped = char == "\\" and not escaped
            else:
                quote = char if char in "'\"" else ""
                depth += (char in "([{") - (char in ")]}")
            source += char
            yield from self._hold()
            if depth == 0:
                break
        return source


def _call(source: str) -> tuple[str, str] | None:
    """A call's name and its arguments as JSON; None if it is no call, or its arguments are no literals."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as "\\d" in regular expressions
            call = ast.parse(source, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            return None
        name = ast.unparse(call.func)
        arguments = {str(word.arg): _value(word.value) for word in call.keywords}
        return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr) -> Any:
    """A literal's value, with JSON's names for constants besides Python's."""

    class Constants(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node

    return ast.literal_eval(Constants().visit(node))
