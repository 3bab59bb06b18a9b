"""Outputs on their way to a task: joined while nobody takes them, and none lost."""

import asyncio

import pytest

from jaxllm.engine.inputs import EngineInput
from jaxllm.engine.output_stream import OutputStream, post
from jaxllm.engine.outputs import CompletionOutput, Logprob, RequestOutput
from jaxllm.sampling import RequestOutputKind, SamplingParams


def request(kind: RequestOutputKind) -> EngineInput:
    return EngineInput(None, (1,), SamplingParams(output_kind=kind), max_tokens=9)


def output(name: str, *samples: CompletionOutput, finished: bool = False) -> RequestOutput:
    return RequestOutput(name, None, [1], None, list(samples), finished)


def sample(index: int, text: str, reason=None) -> CompletionOutput:
    logprobs = [{ord(letter): Logprob(-1.0)} for letter in text]
    return CompletionOutput(index, text, [ord(letter) for letter in text], -1.0, logprobs, reason)


async def stream(kind: RequestOutputKind, *names: str) -> tuple[OutputStream, list[OutputStream]]:
    closed: list[OutputStream] = []
    return OutputStream({name: request(kind) for name in names}, closed.append), closed


def test_deltas_are_joined_sample_by_sample() -> None:
    async def main() -> None:
        found, closed = await stream(RequestOutputKind.DELTA, "a", "b")
        found.put("a", output("a", sample(0, "he"), sample(1, "x")))
        found.put("b", output("b", sample(0, "b", "stop"), finished=True))
        found.put("a", output("a", sample(0, "llo", "length")))
        found.put("a", output("a", sample(1, "y", "stop"), finished=True))
        assert not found.finished
        a, b = await found.take()
        assert [(s.index, s.text, s.finish_reason) for s in a.outputs] == [
            (0, "hello", "length"),
            (1, "xy", "stop"),
        ]
        assert a.outputs[0].token_ids == [ord(letter) for letter in "hello"]
        assert [list(position) for position in a.outputs[0].logprobs or ()] == [[ord(c)] for c in "hello"]
        assert (a.finished, b.outputs[0].text) == (True, "b")
        assert found.finished
        found.close()
        assert closed == []

    asyncio.run(main())


def test_cumulative_outputs_replace_each_other() -> None:
    async def main() -> None:
        found, closed = await stream(RequestOutputKind.CUMULATIVE, "a")
        found.put("a", output("a", sample(0, "he")))
        found.put("a", output("a", sample(0, "hello")))
        [one] = await found.take()
        assert one.outputs[0].text == "hello"
        assert not found.finished
        found.close()
        found.close()
        assert closed == [found]

    asyncio.run(main())


def test_errors_and_outputs_from_another_thread() -> None:
    async def main() -> None:
        found, _ = await stream(RequestOutputKind.DELTA, "a")
        taking = asyncio.create_task(found.take())
        await asyncio.to_thread(post, [(found, "a", output("a", sample(0, "h")))])
        assert (await taking)[0].outputs[0].text == "h"
        await asyncio.to_thread(post, [(found, "a", RuntimeError("broken"))])
        with pytest.raises(RuntimeError, match="broken"):
            await found.take()
        return None

    asyncio.run(main())


def test_nobody_waits_any_more() -> None:
    found, _ = asyncio.run(stream(RequestOutputKind.DELTA, "a"))
    post([(found, "a", output("a", sample(0, "h")))])  # its loop is closed: nothing happens
