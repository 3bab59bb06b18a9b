"""LangChain: tools bound to a model, whole and streamed, and answers of a form."""

from functools import reduce
from operator import add
from typing import Literal

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from scripted import CALL, writes

pytestmark = pytest.mark.clients


@tool
def weather(city: str) -> str:
    """The weather."""
    return f"sunny in {city}"


class Place(BaseModel):
    """Where."""

    city: Literal["Paris", "Rome"]


@pytest.fixture
def model(url: str) -> ChatOpenAI:
    return ChatOpenAI(model="tiny", base_url=url, api_key="none", temperature=0, max_retries=0)


def test_tools(model: ChatOpenAI) -> None:
    messages = [HumanMessage("hi")]
    with writes(CALL, CALL, "It is sunny."):
        found = model.bind_tools([weather]).invoke(messages)
        streamed = reduce(add, model.bind_tools([weather]).stream(messages))
        assert [(call["name"], call["args"]) for call in found.tool_calls] == [("weather", {"city": "Paris"})]
        assert [call["args"] for call in streamed.tool_calls] == [{"city": "Paris"}]
        [call] = found.tool_calls
        result: ToolMessage = weather.invoke(call)
        assert model.bind_tools([weather]).invoke([*messages, found, result]).content == "It is sunny."


def test_a_tool_that_must_be_called(model: ChatOpenAI) -> None:
    for choice in ("any", "Place"):
        bound = model.bind_tools([Place], tool_choice=choice, strict=True, parallel_tool_calls=False)
        assert bound.invoke("hi").tool_calls[0]["args"]["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_an_answer_of_a_form(model: ChatOpenAI, method: Literal["function_calling", "json_schema"]) -> None:
    structured = model.with_structured_output(Place, method=method)
    assert structured.invoke("hi").city in ("Paris", "Rome")
    *_, last = structured.stream("hi")
    assert last.city in ("Paris", "Rome")


def test_responses(url: str) -> None:
    model = ChatOpenAI(model="tiny", base_url=url, api_key="none", temperature=0, use_responses_api=True)
    with writes(f"Well. {CALL}"):
        found = model.bind_tools([weather]).invoke("hi")
        streamed = reduce(add, model.bind_tools([weather]).stream("hi"))
    for message in (found, streamed):
        assert [call["args"] for call in message.tool_calls] == [{"city": "Paris"}]
        assert message.text == "Well."
