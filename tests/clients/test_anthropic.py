"""Anthropic's own client: tools, reasoning and forms, whole and streamed."""

from typing import Any, Literal

import anthropic
import pydantic
import pytest
from running import Running
from scripted import CALL, CITY, configured, writes

pytestmark = pytest.mark.clients
ASK: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "messages": [{"role": "user", "content": "hi"}]}
TOOLS: list[Any] = [{"name": "weather", "description": "d", "input_schema": CITY}]


class City(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]


def test_tools_and_reasoning(server: Running) -> None:
    flags = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    with (
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client,
        configured(server, **flags),
        writes(f"<think>Hm.</think>Well. {CALL}"),
    ):
        whole = client.messages.create(tools=TOOLS, **ASK)
        with client.messages.stream(tools=TOOLS, **ASK) as stream:
            kinds = {event.type for event in stream}
            streamed = stream.get_final_message()
        assert {"thinking", "text", "input_json"} <= kinds
        for message in (whole, streamed):
            thinking, text, call = message.content
            assert (thinking.thinking, text.text, call.input) == ("Hm.", "Well.", {"city": "Paris"})
            assert message.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": whole.content[2].id, "content": "sunny"}
        turns = [{"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
        with writes("Sunny."):
            answer = client.messages.create(tools=TOOLS, **ASK | {"messages": ASK["messages"] + turns})
    assert answer.content[0].text == "Sunny."


def test_a_tool_that_must_be_called(server: Running) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        for choice in (
            {"type": "any", "disable_parallel_tool_use": True},
            {"type": "tool", "name": "weather"},
        ):
            [block] = client.messages.create(tools=TOOLS, tool_choice=choice, **ASK).content
            assert block.input["city"] in ("Paris", "Rome")
        with pytest.raises(anthropic.BadRequestError, match="'other'"):
            client.messages.create(tools=TOOLS, tool_choice={"type": "tool", "name": "other"}, **ASK)


def test_an_answer_in_a_form(server: Running) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        assert isinstance(client.messages.parse(output_format=City, **ASK).parsed_output, City)
        with client.messages.stream(output_format=City, **ASK) as stream:
            assert isinstance(stream.get_final_message().parsed_output, City)
