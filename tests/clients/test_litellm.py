"""LiteLLM: tools, whole and streamed, and reasoning."""

import json
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel
from running import Running
from scripted import CALL, TIME_CALL, TOOLS, configured, writes

pytestmark = pytest.mark.clients


@pytest.fixture
def ask(url: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {
        "model": "openai/tiny",
        "api_base": url,
        "api_key": "none",
        "messages": messages,
        "temperature": 0,
    }


def test_tools(ask: dict[str, Any]) -> None:
    with writes(f"Well. {CALL} {TIME_CALL}"):
        whole = litellm.completion(tools=TOOLS, **ask).choices[0]
        chunks = list(litellm.completion(tools=TOOLS, stream=True, **ask))
    built = litellm.stream_chunk_builder(chunks).choices[0]
    for choice in (whole, built):
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Well.")
        found = [
            (call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls
        ]
        assert found == [("weather", {"city": "Paris"}), ("time", {})]
    forced = litellm.completion(tools=TOOLS[:1], tool_choice="required", parallel_tool_calls=False, **ask)
    assert forced.choices[0].message.tool_calls[0].function.name == "weather"


def test_an_answer_of_a_form(ask: dict[str, Any]) -> None:
    class Place(BaseModel):
        city: Literal["Paris", "Rome"]

    whole = litellm.completion(response_format=Place, **ask).choices[0].message.content
    chunks = list(litellm.completion(response_format=Place, stream=True, **ask))
    assert Place.model_validate_json(whole)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_reasoning(server: Running, ask: dict[str, Any]) -> None:
    with configured(server, reasoning_parser="qwen3"), writes("<think>Hm.</think>Yes."):
        message = litellm.completion(**ask).choices[0].message
        chunks = list(litellm.completion(stream=True, **ask))
    assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


def test_anthropics_interface(server: Running) -> None:
    messages = [{"role": "user", "content": "hi"}]
    ask = {"model": "anthropic/tiny", "api_base": server.url, "api_key": "none", "messages": messages}
    with writes(f"Well. {CALL}"):
        whole = litellm.completion(tools=TOOLS, max_tokens=100, **ask)
        chunks = list(litellm.completion(tools=TOOLS, max_tokens=100, stream=True, **ask))
    for found in (whole, litellm.stream_chunk_builder(chunks)):
        message = found.choices[0].message
        assert message.content == "Well."
        assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}
