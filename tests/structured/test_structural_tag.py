"""Free text with parts between tags that are held to a form."""

import json
import re
from typing import Any

import pytest
from small_text import EOS, USER, make_tokenizer
from walks import allowed, grammar_of, make_table

from jaxllm.structured.grammar import Grammar
from jaxllm.structured.tokens import TokenTable

Format = dict[str, Any]
INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}


@pytest.fixture(scope="module")
def table() -> TokenTable:
    return make_table(make_tokenizer(), {EOS}, size=130)


def is_whole(grammar: Grammar, text: str) -> bool | None:
    """Whether a text may be an output; None if it cannot even be the beginning of one."""
    pieces = [piece for piece in re.split(r"(<\|user\|>)", text) if piece]
    tokens = [id for piece in pieces for id in ([USER] if piece == "<|user|>" else grammar.tokens(piece))]
    matcher = grammar.matcher()
    for token in tokens:
        if token not in allowed(matcher):
            return None
        matcher.accept(token)
    return matcher.is_complete or EOS in allowed(matcher)


def tag(begin: str, content: Format, end: str | list[str]) -> Format:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def const(value: str) -> Format:
    return {"type": "const_string", "value": value}


def triggered(*tags: Format, triggers: list[str], **options: Any) -> Format:
    return {"type": "triggered_tags", "triggers": triggers, "tags": list(tags), **options}


def sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


A, B = tag("<a>", INTEGER, "|"), tag("<b>", INTEGER, "|")


def times(kind: str, **limits: int) -> Format:
    return {"type": kind, "content": A, **limits}


BOTH = {"at_least_one": True, "stop_after_first": True}
FORMATS: dict[str, tuple[Format, list[str], list[str], list[str]]] = {
    # format, outputs, beginnings of outputs, neither
    "const": (const("ab"), ["ab"], ["", "a"], ["b", "abc"]),
    "no text": (tag("", const(""), ""), [""], [], ["a"]),
    "schema": ({**INTEGER, "style": "json", "any_order": False}, ["12", "-3"], ["-"], ["a"]),
    "regex": ({"type": "regex", "pattern": "a/[0-9]{2}"}, ["a/12"], ["a/1"], ["a1"]),
    "grammar": ({"type": "grammar", "grammar": 'root ::= "(" root ")" | "z"'}, ["((z))"], ["((z"], ["z)"]),
    "any": ({"type": "any_text"}, ["", "<a> |\n"], [], ["<|user|>"]),
    "any but": ({"type": "any_text", "excludes": ["no", "a b"]}, ["nn ab"], [], ["a no", "a b"]),
    "tag": (tag("<t>", {"type": "any_text"}, ["</t>", "!"]), ["<t>a!", "<t></t>"], ["<t>a<"], ["<t>a!b"]),
    "sequence": (sequence(const("a"), A, {"type": "any_text"}), ["a<a>1|x"], ["a<a>"], ["a1"]),
    "or": ({"type": "or", "elements": [const("a"), A]}, ["a", "<a>1|"], ["<"], ["a<"]),
    "optional": (
        sequence({"type": "optional", "content": A}, const("x")),
        ["x", "<a>1|x"],
        ["<a>1|"],
        ["xx"],
    ),
    "plus": (sequence({"type": "plus", "content": A}, const("x")), ["<a>1|<a>2|x"], ["<a>1|"], ["x"]),
    "star": (sequence({"type": "star", "content": A}, const("x")), ["x", "<a>1|<a>2|x"], ["<a>1|"], ["|"]),
    "repeat": ({"type": "repeat", "min": 1, "max": 2, "content": A}, ["<a>1|<a>2|"], [""], ["<a>1|" * 3]),
    "at least": ({"type": "repeat", "min": 2, "max": -1, "content": A}, ["<a>1|" * 3], ["<a>1|"], ["a"]),
    "list": (
        {"type": "tags_with_separator", "separator": ", ", "tags": [A, B]},
        ["", "<a>1|, <b>2|"],
        ["<a>1|, "],
        ["<a>1|<b>2|", "x"],
    ),
    "list of one": (
        {"type": "tags_with_separator", "separator": ", ", "tags": [A], **BOTH},
        ["<a>1|"],
        [""],
        ["<a>1|, "],
    ),
    "triggered": (
        triggered(A, B, triggers=["<"]),
        ["", "hi", "a <a>1| b <b>2|"],
        ["hi <", "hi <a>1"],
        ["hi <c", "<a>x"],
    ),
    "triggered first": (
        triggered(A, B, triggers=["<a", "<b"], at_least_one=True),
        ["<a>1|", "<b>1| then <a>2|"],
        ["", "<b>1"],
        ["x"],
    ),
    "triggered once": (
        triggered(A, triggers=["<a"], stop_after_first=True),
        ["", "x", "x <a>1|"],
        ["x <a"],
        ["x <a>1| "],
    ),
    "triggered first and once": (
        triggered(A, triggers=["<a"], **BOTH),
        ["<a>1|"],
        ["", "<a"],
        ["x", "<a>1|x"],
    ),
    "triggered in a tag": (
        tag("(", triggered(A, triggers=["<a"], excludes=["no"]), ")"),
        ["(x)", "(x<a>1|y)"],
        ["(x", "(<a>"],
        ["(x)y", "(<a>)", "(no"],
    ),
    "special tokens": (
        triggered(tag("<|user|>a", INTEGER, "x<|user|>"), triggers=["<|user|>"]),
        ["hi", "hi<|user|>a7x<|user|> x"],
        ["<|user|>", "<|user|>a7x"],
        ["<|user|>b", "<|user|>a7<|user|>"],
    ),
    "a special token at an end": (
        tag("a", {"type": "any_text"}, "x<|user|>"),
        ["abxx<|user|>"],
        ["ab"],
        ["ab<|user|>"],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(table: TokenTable, name: str) -> None:
    form, outputs, beginnings, others = FORMATS[name]
    grammar = grammar_of(table)(structural_tag={"type": "structural_tag", "format": form})
    for texts, expected in ((outputs, True), (beginnings, False), (others, None)):
        for text in texts:
            assert is_whole(grammar, text) is expected, text


def test_the_older_form(table: TokenTable) -> None:
    structures = [{"begin": f"<f={n}>", "schema": {"enum": [n]}, "end": "</f>"} for n in (1, 2)]
    older = {"structures": structures, "triggers": ["<f="]}
    grammar = grammar_of(table)(structural_tag=json.dumps({"type": "structural_tag", **older}))
    assert is_whole(grammar, "so <f=2>2</f> and <f=1>1</f>")
    assert is_whole(grammar, "<f=2>1") is None


def test_options_of_json(table: TokenTable) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}}
    form = {"format": tag("<", {"type": "json_schema", "json_schema": schema}, ">")}
    grammar = grammar_of(table)(
        structural_tag=form, disable_any_whitespace=True, disable_additional_properties=True
    )
    assert is_whole(grammar, '<{"a":1}>')
    assert is_whole(grammar, '<{"a": 1}>') is None
    assert is_whole(grammar, '<{"b') is None


def test_reasoning_before_it(table: TokenTable) -> None:
    grammar = grammar_of(table)(structural_tag={"format": A}, prefix='start: "so "')
    assert is_whole(grammar, "so <a>1|")
    assert is_whole(grammar, "<a>1|") is None


STRUCTURE = {"begin": "a", "schema": {}, "end": ""}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "format: is missing"),
        ({"type": "x", "format": A}, "type: must be 'structural_tag'"),
        ({"format": 5}, "format: must be an object"),
        ({"format": {"type": []}}, r"format.type: \[\] is not supported"),
        ({"format": {"type": "token"}}, "format.type: 'token' is not supported; there are const_string, "),
        ({"format": sequence(A, 5)}, r"format.elements\[1\].type: None is not supported"),
        ({"format": {"type": "any_text", "max_tokens": 5}}, "format.max_tokens: not supported"),
        ({"format": {**INTEGER, "style": "qwen_xml"}}, "format.style: 'qwen_xml' is not supported"),
        ({"format": {"type": "regex"}}, "format.pattern: is missing"),
        ({"format": {"type": "regex", "pattern": 5}}, "format.pattern: must be a string"),
        ({"format": {"type": "regex", "pattern": "("}}, "unclosed group"),
        ({"format": {"type": "or", "elements": []}}, "format.elements: must hold at least one"),
        ({"format": times("repeat", min=True, max=2)}, "format.min: must be a whole"),
        ({"format": times("repeat", min=3, max=2)}, "format.max: must be -1"),
        ({"format": sequence({"type": "any_text"}, A)}, r"format.elements\[0\]: any text must come last"),
        ({"format": tag("a", {"type": "any_text"}, "")}, "format.content: any text must come last"),
        ({"format": tag("a", INTEGER, [])}, "format.end: must be a string or"),
        (
            {"format": triggered(INTEGER, triggers=["a"])},
            r"format.tags\[0\]: must be an object of type",
        ),
        (
            {"format": triggered(A, triggers=[""])},
            r"format.triggers\[0\]: must be a string that",
        ),
        ({"format": triggered(A, triggers=["b"])}, r"format.tags\[0\].begin: begins with 0 of"),
        ({"format": triggered(A, triggers=["<", "<a"])}, r"format.tags\[0\].begin: begins with 2 of"),
        ({"format": triggered(A, triggers=["<a", "b"])}, "format.triggers: no tag begins with 'b'"),
        ({"structures": [], "triggers": ["a"]}, "structures: must hold at least one"),
        ({"structures": [{"begin": "a"}], "triggers": ["a"]}, r"structures\[0\].schema: is missing"),
        ({"structures": [STRUCTURE], "triggers": ["b"]}, r"structures\[0\].begin: begins with 0"),
        ({"structures": [STRUCTURE]}, "triggers: is missing"),
        ({"structures": [{**STRUCTURE, "schema": {"not": {}}}], "triggers": ["a"]}, "Unimplemented keys"),
        ({"format": {**INTEGER, "json_schema": {"multipleOf": 99999989}}}, "multipleOf 99999989"),
    ],
)
def test_what_is_refused(table: TokenTable, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^structured_outputs.structural_tag: .*{said}"):
        grammar_of(table)(structural_tag=given)


def test_a_tag_of_tags_of_tags(table: TokenTable) -> None:
    deep = A
    for _ in range(2000):
        deep = {"type": "optional", "content": deep}
    with pytest.raises(ValueError, match="structural_tag"):
        grammar_of(table)(structural_tag={"format": deep})
