"""OpenAI's responses, with OpenAI's client."""

import json
import re
import time
from typing import Any

import jsonschema
import openai
import pytest
import scripted
from running import Running

GREEDY = {"model": "tiny", "temperature": 0}


def chat(server: Running, messages, **fields) -> str:
    body = {"max_tokens": 10, "temperature": 0, "messages": messages} | fields
    return server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]


def test_an_answer_is_made_kept_and_forgotten(server: Running) -> None:
    client = server.openai
    found = client.responses.create(
        input="hi", instructions="s", max_output_tokens=10, metadata={"a": "b"}, **GREEDY
    )
    assert found.output_text == chat(
        server, [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    )
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (found.usage.output_tokens, found.metadata) == (10, {"a": "b"})
    assert client.responses.retrieve(found.id) == found
    client.responses.delete(found.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)


def test_a_conversation_goes_on(server: Running) -> None:
    client = server.openai
    one = client.responses.create(input="hi", max_output_tokens=10, instructions="only here", **GREEDY)
    two = client.responses.create(input="yo", max_output_tokens=10, previous_response_id=one.id, **GREEDY)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": one.output_text},
        {"role": "user", "content": "yo"},
    ]
    assert two.output_text == chat(server, messages)
    given_back = client.responses.create(
        input=[messages[0], *one.output, messages[2]], max_output_tokens=10, **GREEDY
    )
    assert given_back.output_text == two.output_text
    unkept = client.responses.create(input="hi", max_output_tokens=1, store=False, **GREEDY)
    with pytest.raises(openai.NotFoundError, match="previous_response_id"):
        client.responses.create(input="yo", previous_response_id=unkept.id, **GREEDY)


def test_a_stream(server: Running) -> None:
    client = server.openai
    whole = client.responses.create(input="hi", max_output_tokens=20, **GREEDY)
    events = list(client.responses.create(input="hi", max_output_tokens=20, stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text == events[-4].text
    assert events[-1].response.output_text == whole.output_text
    assert client.responses.retrieve(events[-1].response.id).output_text == whole.output_text


def test_logprobs(server: Running) -> None:
    found = server.openai.responses.create(
        input="hi", max_output_tokens=4, include=["message.output_text.logprobs"], top_logprobs=2, **GREEDY
    )
    logprobs = found.output[0].content[0].logprobs
    assert "".join(token.token for token in logprobs) == found.output_text
    assert {len(token.top_logprobs) for token in logprobs} == {2}


def test_in_the_background_and_cancelled(server: Running) -> None:
    client = server.openai

    def done(response_id: str):
        end = time.monotonic() + 20
        while (found := client.responses.retrieve(response_id)).status == "in_progress":
            assert time.monotonic() < end
            time.sleep(0.005)
        return found

    begun = client.responses.create(input="hi", max_output_tokens=10, background=True, **GREEDY)
    assert done(begun.id).output_text == chat(server, [{"role": "user", "content": "hi"}])
    runs = [
        client.responses.create(input=f"hi {i}", max_output_tokens=110, background=True, **GREEDY)
        for i in range(12)
    ]
    last = client.responses.cancel(runs[-1].id)
    assert last.status == "cancelled"
    assert {done(run.id).status for run in runs[:-1]} <= {"incomplete", "completed"}
    assert client.responses.cancel(begun.id).status == "incomplete"
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.responses.create(input="yo", previous_response_id=runs[-1].id, **GREEDY)
    server.wait_idle()


def test_who_leaves_cancels(server: Running) -> None:
    body = {"input": "hi", "max_output_tokens": 110, "stream": True}
    with server.http.stream("POST", "/v1/responses", json=body) as response:
        first = next(line for line in response.iter_lines() if line.startswith("data: "))
    server.wait_idle()
    found = json.loads(first.removeprefix("data: "))["response"]
    assert found["status"] == "in_progress"
    assert server.openai.responses.retrieve(found["id"]).status == "cancelled"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        ({"input": "a" * 500}, "input"),
        ({"input": "a", "tools": [{"type": "function"}]}, "tools"),
        ({"input": "a", "reasoning": {"effort": "high"}}, "reasoning"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text"),
        ({"input": "a", "truncation": "auto"}, "truncation"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "top_logprobs": 3}, "top_logprobs"),
        ({"input": "a", "background": True, "stream": True}, "background"),
        ({"input": "a", "nonsense": 3}, "nonsense"),
    ],
)
def test_bad_requests(server: Running, fields: dict, param: str) -> None:
    response = server.post("/v1/responses", **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert re.split(r"[.\[]", error["param"] or "")[0] in (param, "format")


def strict(schema: Any) -> Any:
    """The schema, with no other properties than it names."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(part) for name, part in schema.items()}
    return {**closed, "additionalProperties": False} if "properties" in schema else closed


def test_answers_and_events_are_of_the_documents_form(tool_server: Running) -> None:
    components = strict(tool_server.http.get("/openapi.json").json()["components"])

    def check(found: Any, name: str) -> None:
        form = {"$ref": f"#/components/schemas/{name}", "components": components}
        jsonschema.validate(found, form, jsonschema.Draft202012Validator)

    tools = [{"type": "function", "name": "weather", "parameters": scripted.CITY}]
    flags = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    plain = {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    with (
        scripted.configured(tool_server, **flags),
        scripted.writes(f"<think>Hm.</think>Well. {scripted.CALL}"),
    ):
        called = {"input": "hi", "tools": tools, "metadata": {"a": "b"}}
        found = [tool_server.post("/v1/responses", **called).json()]
        assert [item["type"] for item in found[0]["output"]] == ["reasoning", "message", "function_call"]
        lines = tool_server.post("/v1/responses", **called, stream=True).text.splitlines()
    found.append(tool_server.post("/v1/responses", **plain, max_output_tokens=3).json())
    lines += tool_server.post("/v1/responses", **plain, max_output_tokens=3, stream=True).text.splitlines()
    for answer in found:
        check(answer, "ResponseObject")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    for event in events:
        check(event, "ResponseStreamEvent")
    assert len({event["type"] for event in events}) == 14
    check(tool_server.http.delete(f"/v1/responses/{found[0]['id']}").json(), "DeletedResponse")


def test_the_store_is_bounded(server: Running) -> None:
    store = server.service.responses
    ids = [server.post("/v1/responses", input="a", max_output_tokens=1).json()["id"] for _ in range(3)]
    capacity, store._capacity = store._capacity, 2
    try:
        ids.append(server.post("/v1/responses", input="a", max_output_tokens=1).json()["id"])
        assert len(store) == 2
        assert server.http.get(f"/v1/responses/{ids[-1]}").is_success
        assert server.http.get(f"/v1/responses/{ids[0]}").status_code == 404
    finally:
        store._capacity = capacity
