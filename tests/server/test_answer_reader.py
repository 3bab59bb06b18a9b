"""An answer taken apart: reasoning first, calls in what comes after, however it arrives."""

from hypothesis import given
from hypothesis import strategies as st

from jaxllm.server.answer_form import AnswerReader
from jaxllm.server.answer_parts import Answer, CallBegin, Reasoning, Text, join_parts
from jaxllm.server.reasoning_parsers import Qwen3ReasoningParser
from jaxllm.server.tool_parsers import HermesToolParser

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
PIECES = st.sampled_from([CALL, "<think>", "</think>", "<tool_call>", "a", " ", "\n", "<", "{"])


def make(**options: bool) -> AnswerReader:
    return AnswerReader(Qwen3ReasoningParser(), HermesToolParser(["add"]), new_id=lambda: "id", **options)


def read(reader: AnswerReader, *pieces: str) -> Answer:
    parts = [part for piece in pieces[:-1] for part in reader.read(piece, finished=False)]
    return join_parts([*parts, *reader.read(pieces[-1], finished=True)])


@given(
    pieces=st.lists(PIECES, min_size=1, max_size=10),
    include=st.booleans(),
    parallel=st.booleans(),
)
def test_pieces_join_to_the_whole(pieces: list[str], include: bool, parallel: bool) -> None:
    options = {"include_reasoning": include, "parallel": parallel}
    text = "".join(pieces)
    whole = read(make(**options), text)
    assert read(make(**options), *pieces) == read(make(**options), *text) == whole
    assert len(whole.calls) <= (99 if parallel else 1)
    assert include or not whole.reasoning
    assert all((call.id, call.name) == ("id", "add") for call in whole.calls)
    everything = read(make(), text)
    assert everything.text == whole.text
    assert everything.calls[: len(whole.calls)] == whole.calls


def test_parts_in_their_order() -> None:
    reader = make()
    assert reader.read("<think>Hm.", finished=False) == [Reasoning("Hm.")]
    assert not reader.called
    rest = reader.read(f"</think>Well. {CALL}", finished=True)
    assert [type(part) for part in rest[:2]] == [Text, CallBegin]
    assert reader.called


def test_without_parsers_text_goes_through() -> None:
    reader = AnswerReader(None, None)
    assert reader.read(CALL, finished=False) == [Text(CALL)]
    assert reader.read("", finished=True) == []
