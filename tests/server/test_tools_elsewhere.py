"""Calls of tools in OpenAI's responses and in Anthropic's messages."""

import json
from typing import Any

import openai
import pytest
from running import Running
from scripted import CALL, CITY, TIME_CALL, writes

ASK: dict[str, Any] = {"model": "tiny", "input": "hi", "temperature": 0}
TOOLS = [
    {"type": "function", "name": "weather", "parameters": CITY, "description": "d", "strict": False},
    {"type": "function", "name": "time", "parameters": None, "strict": False},
]
MESSAGE_TOOLS = [
    {"name": "weather", "input_schema": CITY, "cache_control": {"type": "ephemeral"}},
    {"name": "time", "input_schema": {"type": "object"}, "description": "d"},
]


CALL_BLOCK = {"type": "tool_use", "id": "t", "name": "f", "input": {}}


@pytest.fixture
def server(tool_server: Running) -> Running:
    return tool_server


@pytest.fixture
def seen(server: Running, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the model is shown."""
    prompts: list[str] = []
    render = server.service.engine.render_chat

    async def render_chat(*args: Any, **options: Any) -> Any:
        prompt: Any = await render(*args, **options)
        prompts.append(prompt["prompt"])
        return prompt

    monkeypatch.setattr(server.service.engine, "render_chat", render_chat)
    return prompts


def test_a_response_calls_and_goes_on(server: Running, seen: list[str]) -> None:
    client = server.openai
    with writes(f"Well. {CALL} {TIME_CALL}"):
        found = client.responses.create(tools=TOOLS, **ASK)
    text, one, two = found.output
    assert [item.type for item in found.output] == ["message", "function_call", "function_call"]
    assert (text.content[0].text, one.name, two.arguments) == ("Well.", "weather", "{}")
    assert (one.status, json.loads(one.arguments)) == ("completed", {"city": "Paris"})
    assert len({item.id for item in found.output}) == 3
    assert (found.tools[0].name, found.tool_choice, found.parallel_tool_calls) == ("weather", "auto", True)
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"} for item in (one, two)
    ]
    with writes("Ok."):
        kept = client.responses.create(
            model="tiny", input=results, previous_response_id=found.id, tools=TOOLS, temperature=0
        )
        given = client.responses.create(
            model="tiny", input=[{"role": "user", "content": "hi"}, *found.output, *results], tools=TOOLS
        )
    assert kept.output_text == given.output_text == "Ok."
    assert seen[-1] == seen[-2]
    assert seen[-1] == (
        '<s>[weather][time]<|user|>user::hi<|user|>assistant::Well.weather{"city": "Paris"}'
        f"{one.call_id}time{{}}{two.call_id}<|user|>tool::sunny{one.call_id}<|user|>tool::sunny{two.call_id}>"
    )


def test_a_response_streams_calls(server: Running) -> None:
    with writes(f"Well. {CALL}"):
        events = list(server.openai.responses.create(tools=TOOLS, stream=True, **ASK))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    added = [event.item for event in events if event.type.endswith("output_item.added")]
    assert [(item.type, item.status) for item in added] == [
        ("message", "in_progress"), ("function_call", "in_progress"),
    ]  # fmt: skip
    assert (added[1].name, added[1].arguments) == ("weather", "")
    deltas = [event for event in events if event.type.endswith("function_call_arguments.delta")]
    [done] = [event for event in events if event.type.endswith("function_call_arguments.done")]
    assert "".join(event.delta for event in deltas) == done.arguments == '{"city": "Paris"}'
    assert {(event.item_id, event.output_index) for event in [*deltas, done]} == {(added[1].id, 1)}
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    last = events[-1].response
    assert last.output[1] == events[-2].item
    assert server.openai.responses.retrieve(last.id).output == last.output
    forced = {"tool_choice": "required", "parallel_tool_calls": False}
    with server.openai.responses.stream(tools=TOOLS, **forced, **ASK) as helper:
        final = helper.get_final_response()
    assert final.output[0].type == "function_call"


def test_a_response_is_held_to_calls(server: Running) -> None:
    fields = ASK | {"tools": TOOLS, "parallel_tool_calls": False}
    [call] = server.openai.responses.create(tool_choice="required", **fields).output
    assert call.type == "function_call"
    choice = {"type": "function", "name": "weather"}
    [call] = server.openai.responses.create(tool_choice=choice, **fields).output
    assert set(json.loads(call.arguments)) == {"city"}
    cut = server.openai.responses.create(tool_choice=choice, max_output_tokens=4, **fields)
    assert (cut.status, cut.output[0].status) == ("incomplete", "incomplete")
    background = server.openai.responses.create(tool_choice=choice, background=True, **fields)
    server.wait_idle()
    assert server.openai.responses.retrieve(background.id).output[0].name == "weather"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "'weather'"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "other"}}, "'other'"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": ["weather"]}}, "a mode"),
        ({"tools": TOOLS, "max_tool_calls": 3}, "max_tool_calls"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "'c'"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]}, "not JSON"),
        ({"input": [{"type": "computer_call"}]}, "input"),
    ],
)
def test_responses_refuse(server: Running, fields: dict, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        server.openai.responses.create(**(ASK | fields))
    assert said in found.value.message


def ask(server: Running, **fields: Any):
    turns = [{"role": "user", "content": "hi"}]
    body = {"model": "tiny", "max_tokens": 200, "messages": turns, "temperature": 0} | fields
    return server.post("/v1/messages", **body)


def test_messages_call_and_go_on(server: Running, seen: list[str]) -> None:
    with writes(f"Well. {CALL} {TIME_CALL}"):
        found = ask(server, tools=MESSAGE_TOOLS).json()
        one = ask(
            server, tools=MESSAGE_TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True}
        )
    text, weather, time = found["content"]
    assert text == {"type": "text", "text": "Well."}
    assert (weather["type"], weather["name"], weather["input"]) == ("tool_use", "weather", {"city": "Paris"})
    assert (time["input"], found["stop_reason"]) == ({}, "tool_use")
    assert [block["type"] for block in one.json()["content"]] == ["text", "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": weather["id"], "content": [{"type": "text", "text": "sunny"}]},
        {"type": "tool_result", "tool_use_id": time["id"], "content": "late", "is_error": True},
        {"type": "text", "text": "Go on."},
    ]
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": found["content"]},
        {"role": "user", "content": results},
    ]
    count = server.post("/v1/messages/count_tokens", messages=turns, tools=MESSAGE_TOOLS).json()
    assert ask(server, messages=turns, tools=MESSAGE_TOOLS, max_tokens=1).is_success
    assert seen[-1] == seen[-2]
    assert seen[-1].startswith("<s>[weather][time]<|user|>user::hi<|user|>assistant::Well.weather{")
    assert seen[-1].endswith(
        f"<|user|>tool::sunny{weather['id']}<|user|>tool::Error: late{time['id']}<|user|>user::Go on.>"
    )
    assert count["input_tokens"] > 100


def test_messages_stream_calls(server: Running) -> None:
    with writes(f"Well. {CALL}"):
        lines = ask(server, tools=MESSAGE_TOOLS, stream=True).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in starts] == ["text", "tool_use"]
    assert (starts[1]["name"], starts[1]["input"]) == ("weather", {})
    parts = [event for event in events if event["type"] == "content_block_delta" and event["index"] == 1]
    assert "".join(event["delta"]["partial_json"] for event in parts) == '{"city": "Paris"}'
    assert [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_messages_are_held_to_calls(server: Running) -> None:
    [block] = ask(server, tools=MESSAGE_TOOLS, tool_choice={"type": "tool", "name": "weather"}).json()[
        "content"
    ]
    assert set(block["input"]) == {"city"}
    any_one = {"type": "any", "disable_parallel_tool_use": True}
    [block] = ask(server, tools=MESSAGE_TOOLS, tool_choice=any_one).json()["content"]
    assert block["type"] == "tool_use"
    cut = ask(
        server, tools=MESSAGE_TOOLS, tool_choice={"type": "tool", "name": "weather"}, max_tokens=3
    ).json()
    assert (cut["stop_reason"], cut["content"][0]["input"]) == ("max_tokens", {})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": MESSAGE_TOOLS * 2}, "'weather'"),
        ({"tools": MESSAGE_TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "'other'"),
        ({"tools": MESSAGE_TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tools": MESSAGE_TOOLS, "tool_choice": {"type": "auto", "name": "time"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]}, "'t'"),
        ({"messages": [{"role": "user", "content": [CALL_BLOCK]}]}, "tool_use"),
        ({"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]},
         "messages"),
    ],
)  # fmt: skip
def test_messages_refuse(server: Running, fields: dict, said: str) -> None:
    response = ask(server, **fields)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
