"""Grammars that hold an answer to calls of tools, and keep its reasoning free.

In Lark, as `StructuredOutputsParams.grammar` takes it:
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.server.reasoning_parsers import ReasoningParser
from jaxllm.server.tool_parsers import ToolParser
from jaxllm.server.tools import Tool

ANY = r"/(.|\n)*/"
ANYTHING = {"type": "object"}


class Literals:
    """Words as a grammar has them: tokens that are special are no text, and are named by their ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    @cached_property
    def _ids(self) -> dict[str, int]:
        # made when a grammar needs it: most requests need none, and some tokenizers have thousands
        return {self._vocabulary.added_tokens[id]: id for id in self._vocabulary.special_ids}

    def of(self, word: str) -> str:
        """A word as a terminal."""
        return f"<[{self._ids[word]}]>" if word in self._ids else quoted(word)

    def up_to(self, name: str, word: str) -> str:
        """A rule for any text that ends with the first such word."""
        if word in self._ids:
            return f"{name}: {ANY} {self.of(word)}"
        return f"{name}[lazy]: {ANY} {quoted(word)}"


def quoted(text: str) -> str:
    """Text as a terminal."""
    return json.dumps(text)


def named_grammar(tool: Tool) -> str:
    """One tool's arguments, as `NamedCallParser` reads them."""
    return f"start: {_json(tool.schema)}"


def required_grammar(tools: Sequence[Tool], *, parallel: bool) -> str:
    """A list of calls as `RequiredCallsParser` reads it: one, or at least one."""
    more = '(", " call)*' if parallel else ""
    rules = [f'start: "[" call {more} "]"', f"call: {_either(tools)}"]
    for i, tool in enumerate(tools):
        head = quoted(f'{{"name": "{tool.name}", "arguments": ')
        rules += [f'call_{i}: {head} arguments_{i} "}}"', _arguments(i, tool)]
    return "\n".join(rules)


def auto_grammar(
    tools: Sequence[Tool], parser: type[ToolParser], literals: Literals, *, parallel: bool
) -> str:
    """Any text with calls in it as the model writes them, with arguments that fit strict tools' schemas.

    Raises:
        ValueError: calls in the parser's form cannot be held to schemas.
    """
    if parser.marker is None:
        raise ValueError(
            "tools: with tool_choice 'auto' and this model's form of calls, arguments cannot be held to a "
            "schema; leave strict out, or ask with tool_choice 'required'"
        )
    rules = [
        f"start: marked{'*' if parallel else '?'} text",
        f"text: {ANY}",
        f"marked: marker ({_either(tools)})",
        literals.up_to("marker", parser.marker),
    ]
    for i, tool in enumerate(tools):
        call = parser.call_rule(tool.name, f"arguments_{i}", literals.of)
        schema = _arguments(i, tool) if tool.strict else f"arguments_{i}: {_json(ANYTHING)}"
        rules += [f"call_{i}: {call}", schema]
    return "\n".join(rules)


def reasoning_grammar(parser: ReasoningParser, literals: Literals) -> str | None:
    """What may come before the answer proper: reasoning, and white space after it; None if nothing may."""
    if parser.beginning == "text":
        return None
    opened = literals.of(parser.begin)
    start = f"{opened}? thought space" if parser.beginning == "reasoning" else f"({opened} thought space)?"
    return f"start: {start}\n{literals.up_to('thought', parser.end)}\nspace: /[ \\n]{{0,4}}/"


def _either(tools: Sequence[Tool]) -> str:
    return " | ".join(f"call_{i}" for i in range(len(tools)))


def _arguments(i: int, tool: Tool) -> str:
    return f"arguments_{i}: {_json(tool.schema)}"


def _json(schema: Mapping[str, Any]) -> str:
    """JSON that fits a schema, with white space as in the calls that templates write."""
    form = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return f"%json {json.dumps({**schema, 'x-guidance': form})}"
