"""Calls of tools, read from text: each form, what only looks like one, and text that arrives in pieces."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.server.answer_parts import Answer, CallArguments, CallBegin, Part, Text, join_parts
from jaxllm.server.tool_parsers import (
    TOOL_PARSERS,
    HermesToolParser,
    Llama3JsonToolParser,
    MistralToolParser,
    NamedCallParser,
    PythonicToolParser,
    RequiredCallsParser,
    ToolParser,
    register_tool_parser,
)

TOOLS = ("get_weather", "add")
PARSERS = {name: TOOL_PARSERS.get(name) for name in ("hermes", "llama3_json", "mistral", "pythonic")}
Call = tuple[str, dict[str, Any]]
WEATHER: Call = ("get_weather", {"city": "Paris", "days": [1, 2.5, None], "more": {"a": 'x"}]'}})
ADD: Call = ("add", {})


def read(parser: ToolParser, *pieces: str) -> Answer:
    return join_parts([part for piece in pieces for part in parser.feed(piece)] + list(parser.finish()))


def calls(answer: Answer) -> list[Call]:
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


def hermes(name: str, arguments: dict) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def llama(name: str, arguments: dict) -> str:
    return json.dumps({"name": name, "parameters": arguments})


def python(name: str, arguments: dict) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


WRITERS = {
    "hermes": lambda found: "\n".join(hermes(*call) for call in found),
    "llama3_json": lambda found: "; ".join(llama(*call) for call in found),
    "mistral": lambda found: "".join(f"[TOOL_CALLS]{name}{json.dumps(args)}" for name, args in found),
    "pythonic": lambda found: f"[{', '.join(python(*call) for call in found)}]",
}
NAMES = st.sampled_from(TOOLS)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b_1", "city"]), VALUES, max_size=3)


@pytest.mark.parametrize("name", PARSERS)
@given(found=st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3), data=st.data())
def test_calls_are_read_as_they_were_written(name: str, found: list[Call], data: st.DataObject) -> None:
    text = WRITERS[name](found)
    answer = read(PARSERS[name](TOOLS), *cut(text, data))
    assert calls(answer) == found
    assert answer.text == ""


MARKS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", '{"name": "add",',
    '"arguments": {', '"parameters": ', '{"a": "}\\""}', '"name"', '"add"', "add", "(a=", "'", '"', "[", "]",
    "{", "}", "(", ")", ",", ":", ";", " ", "\n", "<", "\\", "é", "null", "1",
]  # fmt: skip


def cut(text: str, data: st.DataObject) -> list[str]:
    """The text in pieces."""
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6))) if text else []
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("name", [*PARSERS, "required"])
@given(text=st.lists(st.sampled_from(MARKS), max_size=14).map("".join), data=st.data())
def test_pieces_join_to_the_whole(name: str, text: str, data: st.DataObject) -> None:
    kind = PARSERS.get(name, RequiredCallsParser)
    whole = read(kind(TOOLS), text)
    assert read(kind(TOOLS), *cut(text, data)) == whole
    assert read(kind(TOOLS), *text) == whole
    assert not any(call.name == "" for call in whole.calls)
    if not whole.calls:
        assert whole.text == text


@pytest.mark.parametrize("name", PARSERS)
def test_a_call_is_given_out_as_it_arrives(name: str) -> None:
    parser, text = PARSERS[name](TOOLS), WRITERS[name]([WEATHER])
    seen: list[tuple[int, Part]] = [(at, part) for at, char in enumerate(text) for part in parser.feed(char)]
    (begun, begin), *rest = seen
    assert begin == CallBegin(0, "get_weather")
    assert all(isinstance(part, CallArguments) and part.index == 0 for _, part in rest)
    if name != "pythonic":  # it gives out whole calls
        assert begun < text.index("Paris")
        assert len(rest) > 20


def test_text_around_calls() -> None:
    text = f"Let me see.\n\n{hermes(*WEATHER)}\n{hermes(*ADD)}\nDone.\n"
    answer = read(HermesToolParser(TOOLS), text)
    assert (answer.text, calls(answer)) == ("Let me see.\n\n\n\nDone.\n", [WEATHER, ADD])
    answer = read(MistralToolParser(TOOLS), "Wait. [TOOL_CALLS]add{}\n")
    assert (answer.text, calls(answer)) == ("Wait.", [ADD])


@pytest.mark.parametrize(
    ("parser", "text", "expected"),
    [
        (HermesToolParser, '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', {"a": 1}),
        (HermesToolParser, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', {"a": 1}),
        (HermesToolParser, '<tool_call>{"name": "add", "arguments": null}', {}),
        (HermesToolParser, '<tool_call>{"name": "add"}</tool_call>', {}),
        (HermesToolParser, '<tool_call>{"id": [1], "name": "add", "arguments": {}, "x": 1}</tool_call>', {}),
        (HermesToolParser, '<tool_call>{"name": "add", "arguments": {"a": 1}\n</tool_call>', {"a": 1}),
        (Llama3JsonToolParser, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', {"a": 1}),
        (Llama3JsonToolParser, ' {"type": "function", "name": "add", "parameters": {"a": 1}}', {"a": 1}),
        (MistralToolParser, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', {"a": 1}),
        (MistralToolParser, '[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 1}', {"a": 1}),
        (PythonicToolParser, "\n[add(a=True, b=null, c='\\'(]', d={'x': (-1, .5)}, e=\"\\d\")]",
         {"a": True, "b": None, "c": "'(]", "d": {"x": [-1, 0.5]}, "e": "\\d"}),
        (RequiredCallsParser, ' [ {"name": "add", "arguments": {"a": 1}} ]', {"a": 1}),
    ],
)  # fmt: skip
def test_forms_that_models_write(parser: type[ToolParser], text: str, expected: dict) -> None:
    answer = read(parser(TOOLS), text)
    assert (answer.text, calls(answer)) == ("", [("add", expected)])


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        (HermesToolParser, "Use <tool_call> tags.\n"),
        (HermesToolParser, "<tool_call>add(1)</tool_call>"),
        (HermesToolParser, '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        (HermesToolParser, '<tool_call>{"name": "add", '),
        (Llama3JsonToolParser, '{"name": "Bob", "parameters": {}}'),
        (Llama3JsonToolParser, '{"name": "add"}'),
        (Llama3JsonToolParser, 'Say {"name": "add", "parameters": {}}'),
        (Llama3JsonToolParser, '<|python_tag|>print("x")'),
        (MistralToolParser, "[TOOL_CALLS] none"),
        (MistralToolParser, "[TOOL_CALLS]add[ARGS"),
        (PythonicToolParser, "[add(a=b)]"),
        (PythonicToolParser, "[add(1)]"),
        (PythonicToolParser, "[add(**{'a': 1})]"),
        (PythonicToolParser, "[add(a=__import__('os').system('x'))]"),
        (PythonicToolParser, "[add(a=" + "(" * 500 + ")" * 500 + ")]"),
        (PythonicToolParser, "[other(a=1)]"),
        (PythonicToolParser, "[1, 2, 3]"),
        (PythonicToolParser, "add(a=1)"),
        (PythonicToolParser, "[add(a=1e999)]"),
    ],
)
def test_what_is_no_call_is_text(parser: type[ToolParser], text: str) -> None:
    assert read(parser(TOOLS), text) == Answer(text, "", ())


def test_a_call_that_is_cut_off_has_what_there_is() -> None:
    text = hermes(*WEATHER)[:60]
    [call] = read(HermesToolParser(TOOLS), text).calls
    assert json.dumps(WEATHER[1]).startswith(call.arguments)
    assert call.arguments
    assert read(PythonicToolParser(TOOLS), "[add(a=1), add(a='x") == Answer(
        ", add(a='x", "", read(PythonicToolParser(TOOLS), "[add(a=1)").calls
    )


def test_calls_of_a_known_form() -> None:
    assert calls(read(NamedCallParser(["add"]), '{"a":', " 1}")) == [("add", {"a": 1})]
    assert read(NamedCallParser(["add"])) == Answer("", "", ())
    text = json.dumps([{"name": name, "arguments": arguments} for name, arguments in (WEATHER, ADD)])
    assert calls(read(RequiredCallsParser(TOOLS), text)) == [WEATHER, ADD]


def test_ids_have_the_forms_that_templates_take() -> None:
    assert len({HermesToolParser.new_id() for _ in range(9)}) == 9
    assert HermesToolParser.new_id().startswith("call_")
    assert len(MistralToolParser.new_id()) == 9
    assert MistralToolParser.new_id().isalnum()


def test_the_one_on_the_page_does_what_is_said_there() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "operations.md").read_text()
    [code] = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "ShellToolParser" in code]
    [(asked, given)] = re.findall(r"`(ShellToolParser.*?)` gives\n`(.*?)`", page)
    names: dict[str, Any] = {}
    try:
        exec(code, names)
        assert repr(eval(asked, names)) == given
    finally:
        TOOL_PARSERS.unregister("shell")


def test_ones_own() -> None:
    class Shout(ToolParser):
        def __init__(self, tools=()) -> None: ...

        def feed(self, text):
            return [Text(text.upper())]

        def finish(self):
            return []

    register_tool_parser("shout", Shout)
    try:
        assert read(TOOL_PARSERS.get("shout")(), "a").text == "A"
        with pytest.raises(ValueError, match="tool_call_parser: 'shout' is taken"):
            register_tool_parser("shout", Shout)
        with pytest.raises(ValueError, match="empty"):
            register_tool_parser("", Shout)
        with pytest.raises(TypeError, match="tool_call_parser"):
            register_tool_parser("other", 3)
    finally:
        TOOL_PARSERS.unregister("shout")
    with pytest.raises(ValueError, match="tool_call_parser='shout': must be one of hermes, llama3_json"):
        TOOL_PARSERS.get("shout")
