"""Reasoning in chats: a field of its own, and free of what holds the answer to a form."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from running import Running
from scripted import CALL, TOOLS, configured, writes

THINKS = "<think>Hm, so.</think> Yes."
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


@pytest.fixture
def server(tool_server: Running) -> Iterator[Running]:
    flags = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    with configured(tool_server, **flags):
        yield tool_server


def message(server: Running, **fields: Any) -> dict[str, Any]:
    return server.openai.chat.completions.create(**(ASK | fields)).choices[0].message.model_dump()


def stream(server: Running, **fields: Any) -> list[dict[str, Any]]:
    chunks = server.openai.chat.completions.create(stream=True, **(ASK | fields))
    return [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks]


def test_a_field_of_its_own(server: Running) -> None:
    with writes(THINKS):
        found = message(server)
        assert (found["reasoning"], found["content"]) == ("Hm, so.", "Yes.")
        deltas = stream(server)
        assert "".join(delta.get("reasoning", "") for delta in deltas) == "Hm, so."
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
        kinds = [name for delta in deltas[1:] for name in delta]
        assert kinds == sorted(kinds, reverse=True)  # all reasoning comes before the answer
        quiet = message(server, extra_body={"include_reasoning": False})
        assert (quiet["content"], "reasoning" in quiet) == ("Yes.", False)
        assert not any("reasoning" in d for d in stream(server, extra_body={"include_reasoning": False}))
        cut = message(server, max_tokens=10)
        assert (cut["reasoning"], cut["content"]) == ("Hm,", None)
        with configured(server):
            assert message(server)["content"] == THINKS
    with writes("Yes."):
        assert (message(server)["reasoning"], message(server)["content"]) == (None, "Yes.")


def test_r1_reasons_from_the_beginning(server: Running) -> None:
    with configured(server, reasoning_parser="deepseek_r1"), writes("Hm.</think>Yes."):
        found = message(server)
        assert (found["reasoning"], found["content"]) == ("Hm.", "Yes.")


def test_calls_are_read_from_the_answer_alone(server: Running) -> None:
    with writes(f"<think>{CALL}?</think>{CALL}"):
        found = message(server, tools=TOOLS)
        assert (found["reasoning"], found["content"], len(found["tool_calls"])) == (f"{CALL}?", None, 1)
        deltas = stream(server, tools=TOOLS)
        assert "".join(delta.get("reasoning", "") for delta in deltas) == f"{CALL}?"
        names = [call["function"].get("name") for d in deltas for call in d.get("tool_calls") or ()]
        assert [name for name in names if name] == ["weather"]


def test_what_holds_the_answer_lets_reasoning_be(server: Running) -> None:
    # the model is random: an end of its reasoning can be forced only by the prompt, or by its likeliest token
    choice = {"type": "function", "function": {"name": "weather"}}
    closed = {"chat_template_kwargs": {"enable_thinking": False}}
    found = message(server, tools=TOOLS, tool_choice=choice, extra_body=closed)
    assert set(json.loads(found["tool_calls"][0]["function"]["arguments"])) == {"city"}
    assert found["reasoning"] is None
    with configured(server, reasoning_parser="deepseek_r1"):
        open_ended = message(server, tools=TOOLS, tool_choice=choice, max_tokens=30)
    assert len(open_ended["reasoning"]) > 5
    assert open_ended["tool_calls"] is None


def test_reasoning_of_earlier_answers_is_shown(server: Running) -> None:
    for name in ("reasoning", "reasoning_content"):
        messages = [*ASK["messages"], {"role": "assistant", "content": "Yes.", name: "Hm."}, *ASK["messages"]]
        body = ASK | {"messages": messages, "max_tokens": 1, "return_token_ids": True}
        tokens = server.post("/v1/chat/completions", **body).json()["prompt_token_ids"]
        assert "assistant:Hm.:Yes." in server.post("/detokenize", tokens=tokens).json()["prompt"]


def test_responses(server: Running) -> None:
    fields = {"model": "tiny", "input": "hi", "temperature": 0}
    with writes(THINKS):
        whole = server.openai.responses.create(**fields)
        events = list(server.openai.responses.create(stream=True, **fields))
    [reasoning, _] = whole.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.summary) == ("reasoning", "Hm, so.", [])
    assert whole.output_text == "Yes."
    assert whole.usage.output_tokens_details.reasoning_tokens == len("<think>Hm,_so.</think>") - 1
    kinds = [event.type.removeprefix("response.") for event in events]
    first = kinds.index("reasoning_text.delta")
    assert kinds[2:4] == ["output_item.added", "content_part.added"]
    assert kinds.index("reasoning_text.done") < kinds.index("output_text.delta")
    assert first < kinds.index("reasoning_text.done")
    done = events[-1].response
    assert [item.type for item in done.output] == ["reasoning", "message"]
    again = server.openai.responses.create(
        model="tiny", input=[{"role": "user", "content": "hi"}, *done.output], max_output_tokens=1
    )
    assert again.status in ("completed", "incomplete")
    with pytest.raises(openai.BadRequestError, match="include"):
        server.openai.responses.create(**fields, include=["message.output_text.logprobs"])


def test_messages(server: Running) -> None:
    ask = {"max_tokens": 60, "messages": ASK["messages"], "temperature": 0}
    with writes(THINKS):
        found = server.post("/v1/messages", **ask).json()
        assert found["content"] == [
            {"type": "thinking", "thinking": "Hm, so.", "signature": ""},
            {"type": "text", "text": "Yes."},
        ]
        events = server.post("/v1/messages", **ask, stream=True).text
        quiet = server.post("/v1/messages", **ask, thinking={"type": "disabled"}).json()
        assert [block["type"] for block in quiet["content"]] == ["text"]
    deltas = [json.loads(line[6:]) for line in events.splitlines() if '"content_block_delta"' in line[:40]]
    thought = "".join(d["delta"].get("thinking", "") for d in deltas)
    assert (thought, "".join(d["delta"].get("text", "") for d in deltas)) == ("Hm, so.", "Yes.")
    turns = [*ASK["messages"], {"role": "assistant", "content": found["content"]}, *ASK["messages"]]
    assert server.post("/v1/messages", **ask | {"messages": turns, "max_tokens": 1}).is_success
    refused = server.post("/v1/messages", **ask, thinking={"type": "enabled", "budget_tokens": 9})
    assert refused.status_code == 400
    assert "thinking" in refused.json()["error"]["message"]
