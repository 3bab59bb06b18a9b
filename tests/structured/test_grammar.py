"""Masks of small vocabularies, whose texts can be counted."""

import json
import re

import pytest
import tokenizers_made
from small_text import EOS, USER, make_tokenizer
from walks import allowed, grammar_of, make_table, walk, written

from jaxllm.structured import StructuredOutputsParams, grammar
from jaxllm.structured.grammar import Grammar
from jaxllm.structured.tokens import TokenTable


@pytest.fixture(scope="module")
def table() -> TokenTable:
    return make_table(make_tokenizer(), {EOS}, size=130)


def texts(table: TokenTable, tokens: list[int]) -> set[str]:
    return {written(table, [token]) for token in tokens}


def test_masks_follow_the_text(table: TokenTable) -> None:
    matcher = grammar_of(table)(regex="[ab]c?").matcher()
    assert texts(table, allowed(matcher)) == {"a", "b"}
    matcher.accept(table("a")[0])
    assert not matcher.is_complete
    assert texts(table, allowed(matcher)) == {"c", "</s>"}
    matcher.accept(table("c")[0])
    assert matcher.is_complete


def test_the_end_is_allowed_only_where_the_grammar_accepts(table: TokenTable) -> None:
    matcher = grammar_of(table)(regex="(ab)+").matcher()
    for step in range(6):
        assert (EOS in allowed(matcher)) == (step in (2, 4))
        matcher.accept(table("ab")[step % 2])
    matcher.accept(EOS)
    assert matcher.is_complete


def test_a_token_that_is_not_allowed(table: TokenTable) -> None:
    matcher = grammar_of(table)(regex="ab").matcher()
    with pytest.raises(ValueError, match=r"structured_outputs.regex: token \d+ was chosen"):
        matcher.accept(table("b")[0])


def test_special_tokens_are_no_text(table: TokenTable) -> None:
    """Their names can be written, with characters; unknown ids cannot."""
    grammar = grammar_of(table)(choice=["</s>", "<|user|>"])
    for seed in range(6):
        tokens = walk(grammar, seed)
        assert written(table, tokens) in ("</s>", "<|user|>")
        assert not {EOS, USER} & set(tokens)
    anything = allowed(grammar_of(table)(regex="(?s:.)*").matcher())
    assert anything == [EOS, *range(4, 125)]


def test_grammars_may_name_special_tokens(table: TokenTable) -> None:
    assert walk(grammar_of(table)(grammar='start: <|user|> "x"'), 0) == [USER, *table("x")]


@pytest.mark.parametrize("kind", tokenizers_made.ALL)
def test_every_kind_of_tokenizer(kind: str) -> None:
    """What is decoded of allowed tokens fits, whichever way the tokenizer writes spaces and bytes."""
    tokenizer = tokenizers_made.ALL[kind]()
    table = make_table(tokenizer, {tokenizer.eos_token_id})
    pattern = "( ?(one|two|the|cat|a|b|c|s|\\.)){1,6}"
    for seed in range(20):
        assert re.fullmatch(pattern, written(table, walk(grammar_of(table)(regex=pattern), seed)))


def test_one_way_to_go_on_is_taken_as_the_tokenizer_does() -> None:
    tokenizer = tokenizers_made.ALL["byte fallback"]()
    table = make_table(tokenizer, {tokenizer.eos_token_id})
    assert written(table, table("cats é")) == "cats é"
    assert written(table, walk(grammar_of(table)(choice=["cats é"]), 0)) == "cats é"


@pytest.mark.parametrize(
    ("constraint", "fits"),
    [
        ({"json": {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}}, "[1, 1]"),
        ({"json_object": True}, '{"a": [1, {}]}'),
        ({"choice": ["yes", "no", 'a "b"\\']}, 'a "b"\\'),
        ({"grammar": 'root ::= "x" root | "y"'}, "xxy"),
        ({"grammar": 'start: "x" start | /y+/'}, "xxyy"),
        ({"regex": "^a.c$"}, "abc"),
        ({"json_object": True, "whitespace_pattern": "~"}, '{~"a"~:~1~}'),
    ],
)
def test_ways_to_say_it(table: TokenTable, constraint: dict, fits: str) -> None:
    matcher = grammar_of(table)(**constraint).matcher()
    for token in table._longest(fits.encode()):
        assert token in allowed(matcher)
        matcher.accept(token)
    assert matcher.is_complete or EOS in allowed(matcher)


def test_whitespace(table: TokenTable) -> None:
    """By default there is some, and never an endless run of it."""
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    closed = {**schema, "additionalProperties": False}
    assert {written(table, walk(grammar_of(table)(json=closed), seed)) for seed in range(9)} != {'{"a":1}'}
    compact = grammar_of(table)(json=closed, disable_any_whitespace=True)
    assert {written(table, walk(compact, seed)) for seed in range(9)} == {'{"a":1}'}
    matcher = grammar_of(table)(json=closed).matcher()
    for token in table._longest(b"{    "):
        matcher.accept(token)
    assert not any(text.isspace() for text in texts(table, allowed(matcher)))


def test_properties_that_the_schema_does_not_list(table: TokenTable) -> None:
    listed = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    schema = {**listed, "properties": {"a": listed}}
    options = {"json": schema, "disable_any_whitespace": True}
    for closed in (False, True):
        matcher = grammar_of(table)(**options, disable_additional_properties=closed).matcher()
        for token in table._longest(b'{"a":{"a":1'):
            matcher.accept(token)
        assert texts(table, allowed(matcher)) == ({"}"} if closed else {",", "}"})


def test_a_lexer_that_is_full_begins_anew(table: TokenTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs share what has been computed of a grammar; when that is too much, they go on without it."""
    limits = grammar.LLParserLimits(max_lexer_states=300, verbose_errors=False)
    monkeypatch.setattr(grammar, "_LIMITS", limits)
    shared = grammar_of(table)(regex="[a-z]{0,30}a[a-z]{6}")
    first = shared._compiled
    for seed in range(40):
        assert re.fullmatch("[a-z]{0,30}a[a-z]{6}", written(table, walk(shared, seed)))
        if shared._compiled is not first:
            break
    assert shared._compiled is not first


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        ({"regex": "(?=a)b"}, "regex: .*look-around"),
        ({"regex": "(a)\\1"}, "regex: .*backreferences"),
        ({"regex": "("}, "regex: "),
        ({"regex": "(" * 5000 + "a" + ")" * 5000}, "regex: "),
        ({"json": {"not": {"type": "object"}}}, 'json: Unimplemented keys: \\["not"\\]'),
        ({"json": {"type": "thing"}}, "json: "),
        ({"json": {"$ref": "#"}}, "json: there is no text that fits"),
        ({"json": {"$ref": "#/$defs/missing"}}, "json: "),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "json: "),
        ({"json": {"type": "integer", "multipleOf": 1_000_003}}, "json: multipleOf 1000003: at most 10000"),
        ({"json": {"type": "number", "multipleOf": 1e300}}, r"json: multipleOf 1e\+300"),
        ({"grammar": 'start: %json {"type": "integer", "multipleOf": 1e6}'}, "grammar: multipleOf 1e6"),
        ({"json": {"type": "number", "multipleOf": 0.123456}}, "json: multipleOf 0.123456"),
        ({"grammar": 'root ::= "a" missing'}, "grammar: "),
        ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "grammar: nested too deeply"),
        ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "grammar: "),
        ({"grammar": 'start: %json {"type": "integer", "multipleOf": 999983}'}, "grammar: multipleOf"),
        ({"grammar": "hello"}, "grammar: "),
        ({"choice": ["x" * 300_000]}, "choice: 300000 bytes; at most 262144"),
        ({"json_object": True, "whitespace_pattern": "("}, "json_object: "),
    ],
)
def test_what_cannot_be_compiled(table: TokenTable, constraint: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"^structured_outputs.{named}") as error:
        grammar_of(table)(**constraint)
    assert len(str(error.value)) < 400


def test_recursion_that_ends(table: TokenTable) -> None:
    node = {
        "type": "object",
        "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}},
        "required": ["v"],
        "additionalProperties": False,
    }
    grammar = Grammar(table, StructuredOutputsParams(json={"$defs": {"node": node}, "$ref": "#/$defs/node"}))
    assert "next" in "".join(json.dumps(json.loads(written(table, walk(grammar, s)))) for s in range(9))


def test_a_model_without_an_end(table: TokenTable) -> None:
    with pytest.raises(ValueError, match="structured_outputs: the model has no end-of-sequence token"):
        make_table(make_tokenizer(), set())
