"""Reasoning, parted from the answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.server.answer_parts import Reasoning, Text, join_parts
from jaxllm.server.reasoning_parsers import (
    REASONING_PARSERS,
    DeepSeekR1ReasoningParser,
    Qwen3ReasoningParser,
    ReasoningParser,
    count_reasoning,
    register_reasoning_parser,
)

R1, QWEN = DeepSeekR1ReasoningParser, Qwen3ReasoningParser
CLOSED = "<|assistant|>\n<think>\n\n</think>\n\n"


def read(parser: ReasoningParser, *pieces: str) -> tuple[str, str]:
    parts = [part for piece in pieces for part in parser.feed(piece)]
    found = join_parts([*parts, *parser.finish()])
    return found.reasoning, found.text


@pytest.mark.parametrize(
    ("parser", "text", "expected"),
    [
        (R1(), "<think>\nLet me see.\n</think>\n\nYes.\n", ("Let me see.", "Yes.\n")),
        (R1(), "Let me see.\n\nSo</think>Yes.", ("Let me see.\n\nSo", "Yes.")),
        (R1(), " cut off ", ("cut off", "")),
        (R1(CLOSED), "Yes. </think>", ("", "Yes. </think>")),
        (R1("", "<think>Hm"), "m.</think>Yes.", ("m.", "Yes.")),
        (R1("", "<think>Hm</think>Y"), " es.", ("", " es.")),
        (QWEN(), "<think>\nLet me see.\n</think>\n\nYes.\n", ("Let me see.", "Yes.\n")),
        (QWEN(), "\n<think></think>Yes.", ("", "Yes.")),
        (QWEN(), " Yes. <think>No.</think>", ("", " Yes. <think>No.</think>")),
        (QWEN(), "<think>cut off </thi", ("cut off </thi", "")),
        (QWEN(), " <thin", ("", " <thin")),
        (QWEN(CLOSED), "<think>Yes.", ("", "<think>Yes.")),
        (QWEN("<|assistant|>\n<think>\n"), "Let me see.</think>Yes.", ("Let me see.", "Yes.")),
        (QWEN("a user wrote <think>\n<|assistant|>\n"), "Yes.", ("", "Yes.")),
    ],
)
def test_forms(parser: ReasoningParser, text: str, expected: tuple[str, str]) -> None:
    assert read(parser, text) == expected


@pytest.mark.parametrize("kind", [R1, QWEN])
@given(
    text=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "/", " ", "\n", "a", "é", "think>"]), max_size=12
    ),
    places=st.sets(st.integers(0, 40), max_size=5),
    prompt=st.sampled_from(["", CLOSED, "<think>\n"]),
)
def test_pieces_join_to_the_whole(
    kind: type[ReasoningParser], text: list[str], places: set[int], prompt: str
) -> None:
    joined = "".join(text)
    whole = read(kind(prompt), joined)
    ends = sorted(min(place, len(joined)) for place in places)
    pieces = [joined[a:b] for a, b in zip([0, *ends], [*ends, len(joined)], strict=True)]
    assert read(kind(prompt), *pieces) == whole
    found = "".join(whole)
    assert all(found.count(letter) == joined.count(letter) for letter in "aé")


def test_reasoning_arrives_as_it_is_written() -> None:
    parser = QWEN()
    assert list(parser.feed("<think>Let me")) == [Reasoning("Let me")]
    assert list(parser.feed(" see.</think>\nY")) == [Reasoning(" see."), Text("Y")]


@pytest.mark.parametrize(
    ("parser", "tokens", "count"),
    [
        (QWEN(), ["\n", "<thi", "nk>a", "b", "</th", "ink> c", "d</think>"], 6),
        (QWEN(), ["a", "</think>"], 0),
        (QWEN("<think>"), ["a", "b"], 2),
        (QWEN(CLOSED), ["<think>", "</think>"], 0),
        (R1(), ["a", "</think>", "b"], 2),
        (R1(), [], 0),
    ],
)
def test_tokens_of_reasoning_are_counted(parser: ReasoningParser, tokens: list[str], count: int) -> None:
    assert count_reasoning(parser, (token.encode() for token in tokens)) == count


def test_ones_own() -> None:
    class Other(QWEN):
        begin, end = "[", "]"

    register_reasoning_parser("other", Other)
    try:
        assert read(REASONING_PARSERS.get("other")(), "[a]b") == ("a", "b")
    finally:
        REASONING_PARSERS.unregister("other")
    with pytest.raises(ValueError, match="reasoning_parser='other': must be one of deepseek_r1, qwen3"):
        REASONING_PARSERS.get("other")
