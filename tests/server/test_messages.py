"""Anthropic's interface."""

import json

import pytest
from running import Running

TURNS = [{"role": "user", "content": "hi"}]


def schema_format(schema: dict) -> dict:
    return {"type": "json_schema", "schema": schema}


CONFIG = {"format": schema_format({"enum": [[7, "x"]]})}
PREFILLED = [*TURNS, {"role": "assistant", "content": "["}]
TOOL = {"name": "look", "input_schema": {"type": "object"}}


def ask(server: Running, **fields):
    return server.post(
        "/v1/messages", **{"model": "tiny", "max_tokens": 8, "messages": TURNS, "temperature": 0} | fields
    )


def chat(server: Running, messages, **fields):
    body = {"max_tokens": 8, "temperature": 0, "messages": messages} | fields
    return server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]


def test_an_answer(server: Running) -> None:
    found = ask(server, system="s", metadata={"user_id": "u"}).json()
    expected = chat(server, [{"role": "system", "content": "s"}, *TURNS])
    assert found["content"] == [{"type": "text", "text": expected}]
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", "tiny")
    assert (found["stop_reason"], found["stop_sequence"]) == ("max_tokens", None)
    usage = found["usage"]
    assert usage["output_tokens"] == 8
    count = server.post("/v1/messages/count_tokens", messages=TURNS, system="s").json()["input_tokens"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count


@pytest.mark.parametrize("stream", [True, False])
def test_an_output_is_as_long_as_there_is_room(server: Running, stream: bool) -> None:
    turns = [{"role": "user", "content": "a" * 90}]
    found = ask(server, messages=turns, max_tokens=64_000, stream=stream)
    assert found.is_success
    assert '"stop_reason":"model_context_window_exceeded"' in found.text


def test_parts_prefill_and_stop_sequences(server: Running) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    turns = [{"role": "user", "content": parts}]
    plain = chat(server, [{"role": "user", "content": "h\ni"}], max_tokens=12)
    assert ask(server, messages=turns, max_tokens=12).json()["content"][0]["text"] == plain
    stopped = ask(server, messages=turns, max_tokens=12, stop_sequences=[plain[4:6]]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", plain[4:6])
    prefilled = [*TURNS, {"role": "assistant", "content": "ab"}]
    expected = chat(server, prefilled, continue_final_message=True)
    assert ask(server, messages=prefilled).json()["content"][0]["text"] == expected


def test_a_stream(server: Running) -> None:
    whole = ask(server, max_tokens=20).json()
    lines = ask(server, max_tokens=20, stream=True).text.split("\n\n")[:-1]
    events = []
    for line in lines:
        name, data = line.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert events[-1]["type"] == name.removeprefix("event: ")
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    text = "".join(event["delta"]["text"] for event in events[2:-3])
    assert text == whole["content"][0]["text"]
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 20


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{"output_config": CONFIG}, {"output_format": CONFIG["format"]}])
def test_an_answer_with_a_schema(server: Running, fields: dict, stream: bool) -> None:
    response = ask(server, **fields, max_tokens=30, temperature=1, stream=stream)
    if stream:
        data = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
        text = "".join(event["delta"].get("text", "") for event in data if "delta" in event)
        assert data[-2]["delta"]["stop_reason"] == "end_turn"
    else:
        [block], reason = response.json()["content"], response.json()["stop_reason"]
        text = block["text"]
        assert reason == "end_turn"
    assert json.loads(text) == [7, "x"]
    count = server.post("/v1/messages/count_tokens", messages=TURNS, **fields)
    assert count.json() == server.post("/v1/messages/count_tokens", messages=TURNS).json()


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": [{"name": "t"}]}, "tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"nonsense": 1}, "nonsense"),
        ({"output_config": {"effort": "low"}}, "effort: not supported"),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema: is required"),
        ({"output_config": {"format": schema_format({"not": {}})}}, "output_config: "),
        ({"output_config": {"format": schema_format({"a": "x" * 70_000})}}, "at most 65536"),
        ({"output_format": schema_format({"type": 5})}, "output_format: "),
        ({"output_format": schema_format({}), "output_config": CONFIG}, "give one of them"),
        ({"output_config": CONFIG, "messages": PREFILLED}, "output_config: the answer is held"),
        ({"output_config": CONFIG, "tools": [TOOL], "tool_choice": {"type": "any"}}, "output_config: "),
    ],
)
def test_errors_in_their_form(server: Running, fields: dict, name: str) -> None:
    response = ask(server, **fields)
    assert response.status_code == 400
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert name in body["error"]["message"]


def test_a_model_that_is_not_there(server: Running) -> None:
    response = ask(server, model="other")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
