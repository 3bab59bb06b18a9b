"""pydantic-ai: agents with tools, whole and streamed, in OpenAI's two interfaces."""

import asyncio
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ThinkingPart, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from running import Running
from scripted import CALL, configured, writes

pytestmark = pytest.mark.clients


class Place(BaseModel):
    """Where."""

    city: Literal["Paris", "Rome"]


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_an_agent_calls_its_tool(url: str, kind: type[OpenAIChatModel]) -> None:
    async def main() -> None:
        async with OpenAIProvider(base_url=url, api_key="none") as provider:
            agent = Agent(kind("tiny", provider=provider))
            asked: list[str] = []

            @agent.tool_plain
            def weather(city: str) -> str:
                """The weather."""
                asked.append(city)
                return "sunny"

            with writes(CALL, "It is sunny."):
                assert (await agent.run("hi")).output == "It is sunny."
            with writes(CALL, "It is sunny."):
                async with agent.run_stream("hi") as result:
                    assert await result.get_output() == "It is sunny."
            assert asked == ["Paris", "Paris"]

    asyncio.run(main())


@pytest.mark.parametrize("output", [ToolOutput(Place), NativeOutput(Place)])
@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_an_output_of_a_form(url: str, kind: type[OpenAIChatModel], output: Any) -> None:
    async def main() -> None:
        async with OpenAIProvider(base_url=url, api_key="none") as provider:
            agent = Agent(kind("tiny", provider=provider), output_type=output)
            settings = {"parallel_tool_calls": False, "temperature": 0}
            found = await agent.run("hi", model_settings=settings)
            assert found.output.city in ("Paris", "Rome")
            async with agent.run_stream("hi", model_settings=settings) as result:
                assert await result.get_output() == found.output

    asyncio.run(main())


def test_reasoning(server: Running, url: str) -> None:
    async def main() -> None:
        async with OpenAIProvider(base_url=url, api_key="none") as provider:
            agent = Agent(OpenAIChatModel("tiny", provider=provider))
            with configured(server, reasoning_parser="qwen3"), writes("<think>Hm.</think>Yes."):
                found = await agent.run("hi")
            thoughts = [part for message in found.all_messages() for part in message.parts]
            assert [part.content for part in thoughts if isinstance(part, ThinkingPart)] == ["Hm."]
            assert found.output == "Yes."

    asyncio.run(main())
