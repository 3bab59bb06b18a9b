"""What outputs are held to: calls in a known form, strict tools' calls in the model's own, free reasoning."""

import pytest
from small_text import make_tokenizer

from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.server.call_grammars import (
    Literals,
    auto_grammar,
    named_grammar,
    quoted,
    reasoning_grammar,
    required_grammar,
)
from jaxllm.server.reasoning_parsers import DeepSeekR1ReasoningParser, Qwen3ReasoningParser
from jaxllm.server.tool_parsers import HermesToolParser, Llama3JsonToolParser, MistralToolParser
from jaxllm.server.tools import Tool
from jaxllm.structured import StructuredOutputsParams
from jaxllm.structured.grammar import Grammar
from jaxllm.structured.tokens import TokenTable

CITY = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
TOOLS = [Tool("weather", None, CITY | {"additionalProperties": False}, strict=True), Tool("time")]
GOOD, BAD = '{"city": "Paris"}', '{"city": "Rome"}'


def make_vocabulary(*words: str, special: bool = True) -> tuple[Vocabulary, TokenTable]:
    """A vocabulary in which these words are tokens, which are special or (as Qwen 3 has them) are not."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(words), special_tokens=special)
    vocabulary = Vocabulary(tokenizer)
    table = TokenTable(
        [vocabulary.token_bytes(id) or b"" for id in range(len(tokenizer))],
        special_ids=vocabulary.special_ids,
        eos_ids=[2],
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
    )
    return vocabulary, table


def fits(table: TokenTable, params: StructuredOutputsParams, text: str) -> bool:
    """Whether an output may be exactly this."""
    matcher = Grammar(table, params)._compiled.deep_copy()
    tokens = [*table._encode(text)]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def call(arguments: str, name: str = "weather") -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


def test_known_forms() -> None:
    _, table = make_vocabulary()
    named = StructuredOutputsParams(grammar=named_grammar(TOOLS[0]))
    assert [fits(table, named, text) for text in (GOOD, BAD, "", "x")] == [True, False, False, False]
    several = StructuredOutputsParams(grammar=required_grammar(TOOLS, parallel=True))
    one = StructuredOutputsParams(grammar=required_grammar(TOOLS, parallel=False))
    both = f"[{call(GOOD)}, {call('{}', 'time')}]"
    assert [fits(table, several, text) for text in (both, f"[{call(GOOD)}]", "[]")] == [True, True, False]
    assert [fits(table, one, text) for text in (both, f"[{call(GOOD)}]")] == [False, True]
    assert not fits(table, several, f"[{call(BAD)}]")
    assert not fits(table, several, f"[{call('{}', 'other')}]")


MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]")


@pytest.mark.parametrize(("marks", "special"), [((), True), (MARKS, True), (MARKS, False)])
def test_strict_tools_in_the_models_own_form(marks: tuple[str, ...], special: bool) -> None:
    vocabulary, table = make_vocabulary(*marks, special=special)
    literals = Literals(vocabulary)

    def grammar(parser, parallel: bool = True) -> StructuredOutputsParams:
        return StructuredOutputsParams(grammar=auto_grammar(TOOLS, parser, literals, parallel=parallel))

    hermes = grammar(HermesToolParser)
    good, free = (f"<tool_call>{body}</tool_call>" for body in (call(GOOD), call('{"a": 1}', "time")))
    assert all(fits(table, hermes, text) for text in ("hi", f"hi {good} {free}", free, ""))
    assert not fits(table, hermes, f"hi <tool_call>{call(BAD)}</tool_call>")
    assert not fits(table, hermes, "<tool_call>hi</tool_call>")
    mistral = grammar(MistralToolParser, parallel=False)
    for text in (
        f"[TOOL_CALLS][{call(GOOD)}]",
        f"[TOOL_CALLS]weather[ARGS]{GOOD}",
        f"[TOOL_CALLS]weather{GOOD}",
    ):
        assert fits(table, mistral, text)
        assert not fits(table, mistral, text.replace(GOOD, BAD))
    with pytest.raises(ValueError, match="leave strict out"):
        grammar(Llama3JsonToolParser)


@pytest.mark.parametrize("special", [None, True, False])
@pytest.mark.parametrize(
    "held",
    [
        StructuredOutputsParams(json={"const": 12}),
        StructuredOutputsParams(regex="1[2]"),
        StructuredOutputsParams(choice=["12"]),
        StructuredOutputsParams(grammar=f"start: {quoted('12')}"),
        StructuredOutputsParams(grammar='root ::= "12"'),
    ],
    ids=lambda held: held.constraint,
)
def test_reasoning_is_free(special: bool | None, held: StructuredOutputsParams) -> None:
    marks = () if special is None else ("<think>", "</think>")
    vocabulary, table = make_vocabulary(*marks, special=bool(special))
    literals = Literals(vocabulary)

    def accepted(parser) -> list[bool]:
        prefix = reasoning_grammar(parser, literals)
        params = StructuredOutputsParams(**{held.constraint: getattr(held, held.constraint)}, prefix=prefix)
        return [
            fits(table, params, text)
            for text in ("12", "a 1</think> 12", "<think>12</think>12", "12</think>")
        ]

    assert accepted(Qwen3ReasoningParser()) == [True, False, True, False]
    assert accepted(Qwen3ReasoningParser("<think>")) == [False, True, True, False]
    assert accepted(DeepSeekR1ReasoningParser()) == [False, True, True, False]
    assert accepted(DeepSeekR1ReasoningParser("<think></think>")) == [True, False, False, False]


def test_schemas_that_cannot_be_held() -> None:
    _, table = make_vocabulary()
    tool = Tool("a", None, {"properties": {"a": {"type": "x"}}})
    with pytest.raises(ValueError, match="structured_outputs"):
        Grammar(table, StructuredOutputsParams(grammar=named_grammar(tool)))
