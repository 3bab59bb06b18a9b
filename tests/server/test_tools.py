"""Calls of tools in chats, with OpenAI's client."""

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from running import Running
from scripted import CALL, CITY, TIME_CALL, TOOLS, configured, function, writes

from jaxllm.server.config import AnswerConfig
from jaxllm.server.reasoning_parsers import REASONING_PARSERS
from jaxllm.server.service import find_parsers
from jaxllm.server.tool_parsers import TOOL_PARSERS

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


@pytest.fixture
def server(tool_server: Running) -> Running:
    return tool_server


def ask(server: Running, **fields: Any) -> Any:
    return server.openai.chat.completions.create(**(ASK | fields)).choices[0]


def stream(server: Running, **fields: Any) -> dict[str, Any]:
    """A streamed answer, put together by hand."""
    answer: dict[str, Any] = {"content": "", "calls": [], "finish_reason": None}
    chunks: Any = server.openai.chat.completions.create(stream=True, **(ASK | fields))
    for chunk in chunks:
        [choice] = chunk.choices
        assert answer["finish_reason"] is None
        answer["finish_reason"] = choice.finish_reason
        answer["content"] += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert (call.index, call.type) == (len(answer["calls"]), "function")
                assert call.function.arguments == ""
                answer["calls"].append([call.function.name, ""])
            else:
                assert call.function.name is None
                answer["calls"][call.index][1] += call.function.arguments
    return answer


def named(choice) -> list[list[str]]:
    return [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or ()]


def test_required(server: Running) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    whole = ask(server, **fields)
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    [call] = whole.message.tool_calls
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    assert arguments == {} if call.function.name == "time" else arguments["city"] in ("Paris", "Rome")
    streamed = stream(server, **fields)
    assert streamed["calls"] == named(whole)
    assert (streamed["finish_reason"], streamed["content"]) == ("tool_calls", "")
    several = ask(server, tools=[function("time", parameters=None)], tool_choice="required", max_tokens=90)
    assert set(map(tuple, named(several)[:-1])) == {("time", "{}")}
    assert len(named(several)) > 1


def test_a_tool_by_its_name(server: Running) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    whole = ask(server, tools=TOOLS, tool_choice=choice)
    [[name, arguments]] = named(whole)
    assert (name, set(json.loads(arguments))) == ("weather", {"city"})
    streamed = stream(server, tools=TOOLS, tool_choice=choice)
    assert streamed["calls"] == named(whole)
    cut = ask(server, tools=TOOLS, tool_choice=choice, max_tokens=5)
    assert cut.finish_reason == "length"
    assert arguments.startswith(named(cut)[0][1])
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [choice]}}
    of_these = ask(server, tools=TOOLS, tool_choice=allowed, parallel_tool_calls=False)
    assert [name for name, _ in named(of_these)] == ["weather"]


def test_schemas_with_definitions(server: Running) -> None:
    schema = CITY | {"properties": {"city": {"$ref": "#/$defs/city"}}, "$defs": {"city": {"const": "Rome"}}}
    fields = {"tools": [function(parameters=schema)], "parallel_tool_calls": False}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        [[_, arguments]] = named(ask(server, tool_choice=choice, **fields))
        assert json.loads(arguments) == {"city": "Rome"}


def test_calls_as_the_model_likes(server: Running) -> None:
    with writes(f"Let me see. {CALL} {TIME_CALL}"):
        whole = ask(server, tools=TOOLS)
        assert (whole.finish_reason, whole.message.content) == ("tool_calls", "Let me see.")
        assert named(whole) == [["weather", '{"city": "Paris"}'], ["time", "{}"]]
        assert len({call.id for call in whole.message.tool_calls}) == 2
        streamed = stream(server, tools=TOOLS)
        assert (streamed["content"], streamed["calls"]) == ("Let me see.", named(whole))
        assert streamed["finish_reason"] == "tool_calls"
        assert named(ask(server, tools=TOOLS, parallel_tool_calls=False)) == named(whole)[:1]
        assert stream(server, tools=TOOLS, parallel_tool_calls=False)["calls"] == named(whole)[:1]
        for choice in ({"tools": TOOLS, "tool_choice": "none"}, {}, {"tools": []}):
            plain = ask(server, **choice)
            assert (plain.finish_reason, plain.message.tool_calls) == ("stop", None)
            assert plain.message.content == f"Let me see. {CALL} {TIME_CALL}"
    with writes("No <tool_call> here."):
        assert ask(server, tools=TOOLS).message.content == "No <tool_call> here."
        assert stream(server, tools=TOOLS) == {
            "content": "No <tool_call> here.", "calls": [], "finish_reason": "stop",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("llama3_json", '{"name": "weather", "parameters": {"city": "Paris"}}'),
        ("mistral", '[TOOL_CALLS]weather{"city": "Paris"}'),
        ("pythonic", "[weather(city='Paris')]"),
    ],
)
def test_other_forms(server: Running, parser: str, text: str) -> None:
    config = {"enable_auto_tool_choice": True, "tool_call_parser": parser}
    with writes(text), configured(server, **config):
        whole = ask(server, tools=TOOLS)
        assert named(whole) == stream(server, tools=TOOLS)["calls"] == [["weather", '{"city": "Paris"}']]
        forced = ask(server, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "weather"}})
    ids = [choice.message.tool_calls[0].id for choice in (whole, forced)]
    assert [len(id) == 9 for id in ids] == [parser == "mistral"] * 2


def test_several_answers_and_clients_at_once(server: Running) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one() -> list[str]:
                names = []
                fields = ASK | {"tools": TOOLS, "n": 2, "temperature": 1}
                chunks: Any = await client.chat.completions.create(stream=True, **fields)
                async for chunk in chunks:
                    for choice in chunk.choices:
                        calls = choice.delta.tool_calls or ()
                        names += [call.function.name for call in calls if call.id]
                return names

            with writes(CALL):
                assert await asyncio.gather(*[one() for _ in range(3)]) == [["weather", "weather"]] * 3

    asyncio.run(main())
    server.wait_idle()


def test_the_clients_own_stream_helper(server: Running) -> None:
    tools = [function(strict=True)]
    with server.openai.chat.completions.stream(**ASK, tools=tools, tool_choice="required") as events:
        kinds = {event.type for event in events}
        final: Any = events.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.message.tool_calls[0].function.parsed_arguments["city"] in ("Paris", "Rome")


def prompt_of(server: Running, **fields: Any) -> str:
    body = ASK | {"max_tokens": 1, "return_token_ids": True} | fields
    found = server.post("/v1/chat/completions", **body).json()
    return server.post("/detokenize", tokens=found["prompt_token_ids"]).json()["prompt"]


def test_what_the_model_is_shown(server: Running) -> None:
    with writes(CALL):
        choice = ask(server, tools=TOOLS)
    [call] = choice.message.tool_calls
    messages = [
        *ASK["messages"],
        choice.message.model_dump() | {"reasoning": "hm"},
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "sunny"}]},
    ]
    seen = prompt_of(server, tools=TOOLS, messages=messages)
    assert seen == (
        "<s>[weather][time]<|user|>user::hi<|user|>assistant:hm:"
        f'weather{{"city": "Paris"}}{call.id}<|user|>tool::sunny{call.id}>'
    )
    assert prompt_of(server, tools=TOOLS, tool_choice="none") == "<s>[weather][time]<|user|>user::hi>"
    with configured(server, exclude_tools_when_tool_choice_none=True):
        assert prompt_of(server, tools=TOOLS, tool_choice="none") == "<s><|user|>user::hi>"
    tokens = server.post("/tokenize", messages=ASK["messages"], tools=TOOLS).json()["count"]
    assert tokens == len("s[weather][time]uuser::hi>")


CALLS = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools", "tools[0].type"),
        ({"tools": [function("no spaces")]}, "tools", "tools[0].function.name"),
        ({"tools": [function("")]}, "tools", "tools[0].function.name"),
        ({"tools": [function(parameters={"type": "array"})]}, "tools", "parameters: "),
        ({"tools": [function(parameters={"properties": [1]})]}, "tools", "properties"),
        ({"tools": [function(parameters={"required": "city"})]}, "tools", "required"),
        ({"tools": [function(), function()]}, "tools", "'weather'"),
        ({"tools": [function(nonsense=1)]}, "tools", "nonsense"),
        ({"tools": [function(parameters={"type": "object", "properties": {"a": {"type": "x"}}})],
          "tool_choice": "required"}, "tools", "tools"),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
         "tool_choice", "'other'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, "tool_choice", "name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": "weather"}}, "tool_choice", "name"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x"}}},
         "tool_choice", "mode"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": ["weather"]}},
         "tool_choice", "mode"),
        ({"tools": TOOLS, "tool_choice": {
            "type": "allowed_tools", "mode": "auto", "tools": [{"function": 1}]}}, "tool_choice", "names"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice", "tools"),
        ({"tools": TOOLS, "skip_special_tokens": True}, "skip_special_tokens", "leave it out"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "tool_call_id"),
        ({"messages": [{"role": "tool", "tool_call_id": "b", "content": "x"}]}, "messages", "'b'"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "messages", "tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": 3}]}]}, "messages", "function"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            CALLS[0] | {"function": {"name": "f", "arguments": "[1]"}}]}]}, "messages", "JSON object"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "no calls"),
        ({"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"choice": ["a"]}},
         "structured_outputs", "no calls"),
        ({"include_reasoning": False}, "include_reasoning", "--reasoning-parser"),
    ],
)  # fmt: skip
def test_refusals(server: Running, fields: dict, param: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        server.openai.chat.completions.create(extra_body=ASK | {"max_tokens": 1} | fields, **ASK)
    assert (found.value.param, said in found.value.message) == (param, True), found.value.message


PLUGIN = """
from jaxllm.server.answer_parts import CallArguments, CallBegin
from jaxllm.server.reasoning_parsers import Qwen3ReasoningParser, register_reasoning_parser
from jaxllm.server.tool_parsers import CallParser, register_tool_parser

class Shout(CallParser):
    def _read(self):
        while (yield from self._read_text("!")):
            self._begin("weather")
            self._argue("{}")

class Doubt(Qwen3ReasoningParser):
    begin, end = "(", ")"

register_tool_parser("shout", Shout)
register_reasoning_parser("doubt", Doubt)
"""


def test_ones_own_parsers(server: Running, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    flags = {"tool_call_parser": "shout", "enable_auto_tool_choice": True, "reasoning_parser": "doubt"}
    with pytest.raises(ValueError, match="tool_call_parser='shout': must be one of hermes"):
        find_parsers(AnswerConfig(**flags))
    find_parsers(AnswerConfig(**flags, tool_parser_plugin=tmp_path / "mine.py"))
    try:
        with configured(server, **flags), writes("(Hm)Oh!"):
            found = ask(server, tools=TOOLS).message
        assert (found.content, found.model_dump()["reasoning"]) == ("Oh", "Hm")
        assert found.tool_calls[0].function.name == "weather"
    finally:
        TOOL_PARSERS.unregister("shout")
        REASONING_PARSERS.unregister("doubt")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"enable_auto_tool_choice": True}, "needs tool_call_parser"),
        ({"tool_call_parser": "other"}, "tool_call_parser='other': must be one of"),
        ({"reasoning_parser": "other"}, "reasoning_parser='other': must be one of deepseek_r1, qwen3"),
        (
            {"tool_parser_plugin": Path("/nowhere/mine.py")},
            "tool_parser_plugin='/nowhere/mine.py': FileNotFound",
        ),
        ({"reasoning_parser_plugin": Path("/nowhere/mine.txt")}, "must be a Python file"),
    ],
)
def test_flags_that_make_no_sense(flags: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_parsers(AnswerConfig(**flags))


def test_calls_as_the_model_likes_need_a_parser_and_a_template(server: Running) -> None:
    with configured(server), pytest.raises(openai.BadRequestError, match="--enable-auto-tool-choice"):
        ask(server, tools=TOOLS)
    service = server.service
    before, service.chat_template = service.chat_template, None
    try:
        with pytest.raises(openai.BadRequestError, match="template has no place") as found:
            ask(server, tools=TOOLS)
        assert found.value.param == "tools"
    finally:
        service.chat_template = before
    pythonic = {"enable_auto_tool_choice": True, "tool_call_parser": "pythonic"}
    with configured(server, **pythonic), pytest.raises(openai.BadRequestError, match="leave strict out"):
        ask(server, tools=[function(strict=True)])
