"""Replicas that fail come back by themselves: nothing is lost or said twice, and others serve meanwhile."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import OPTIONS, greedy, small_engine
from small_text import text_checkpoint

from jaxllm import (
    AsyncEngine,
    Engine,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from jaxllm.engine import restarts
from jaxllm.engine.core import MOST_FAILURES
from jaxllm.engine.replicas import Replicas
from jaxllm.engine.restarts import RestartBudget

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZES: dict[str, Any] = {
    "max_model_len": 64,
    "num_pages": 60,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "enforce_eager": True,
}
PROMPTS = [np.random.default_rng(i).integers(3, 125, 4 + 2 * i).tolist() for i in range(8)]
LONG, SOON = greedy(24), 20.0


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Tokens of one engine, for one request at a time."""
    with small_engine(**SIZES) as engine:
        return [list(engine.generate(prompt, LONG)[0].outputs[0].token_ids) for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.0)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


class Fault:
    """Takes a replica out at one of its steps, and has its restarts wait or fail, if they are told to.

    Args:
        engine: of several replicas.
        index: of the replica.
        after: steps that go well.
    """

    def __init__(self, engine: Engine, index: int, after: int) -> None:
        core = replicas_of(engine).cores[index]
        self._dispatch, self._reset, self._restart = core.runner.dispatch, core.runner.reset, core.restart
        self._after, self._broken = after, True
        self.can_restart, self.bad_restarts = threading.Event(), 0
        """Restarts wait for the one, and then so many of them fail."""
        self.can_restart.set()
        self.restarts = 0
        core.runner.dispatch = self.dispatch  # pyright: ignore[reportAttributeAccessIssue]
        core.runner.reset = self.reset
        core.restart = self.restart

    def dispatch(self, *arguments: Any, **options: Any) -> Any:
        self._after -= 1
        if self._broken and self._after < 0:
            raise RuntimeError("the device is gone")
        return self._dispatch(*arguments, **options)

    def reset(self) -> None:
        if self._broken:
            raise RuntimeError("the device takes no pages")
        self._reset()

    def restart(self) -> None:
        self.restarts += 1
        assert self.can_restart.wait(SOON)
        if self.bad_restarts:
            self.bad_restarts -= 1
            raise RuntimeError("no device")
        self._broken = False
        self._restart()


def replicated() -> Engine:
    return small_engine(**SIZES, data_parallel_size=2)


def replicas_of(engine: Engine) -> Replicas:
    assert isinstance(engine._core, Replicas)
    return engine._core


def ups(engine: Engine) -> list[float]:
    figures = engine.get_replica_metrics()
    return [figures[name]["replica_up"] for name in "01"]


def check_empty(engine: Engine, threads: int) -> None:
    """No request, page, thread or count is left."""
    assert engine.get_metrics()["pages_used"] == engine.num_unfinished_requests == 0
    assert all(not replica.load and not replica.coming for replica in replicas_of(engine)._replicas)
    assert threading.active_count() <= threads


def deltas_of(engine: Engine, prompts: Sequence[list[int]] = PROMPTS) -> list[list[int]]:
    """What steps give out of prompts, one after another: what is said twice shows twice."""
    found: dict[str, list[int]] = {}
    finished = []
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(24, output_kind=RequestOutputKind.DELTA))
    end = time.monotonic() + SOON
    while engine.has_unfinished_requests():
        assert time.monotonic() < end
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
            finished += [output.request_id] * output.finished
    assert sorted(finished, key=int) == [str(i) for i in range(len(prompts))]
    return [found[name] for name in sorted(found, key=int)]


def test_a_failure_that_is_seen_before_its_step_has_ended(expected: list[list[int]]) -> None:
    """What waits in the replica then is not lost: nobody starts it over before."""
    with replicated() as engine:
        core = replicas_of(engine).cores[1]
        dispatch, step, calls = core.runner.dispatch, core.step, iter(range(10**6))

        def broken(*arguments: Any, **options: Any) -> Any:
            if next(calls) < MOST_FAILURES:
                raise RuntimeError("the device is gone")
            return dispatch(*arguments, **options)

        def slow() -> list[RequestOutput]:
            outputs = step()
            if core.failure is not None:
                time.sleep(0.2)  # in which the other replica ends steps
            return outputs

        core.runner.dispatch = broken  # pyright: ignore[reportAttributeAccessIssue]
        core.step = slow
        # of each of its prompts a step can begin one alone: one of four waits when three steps have failed
        assert deltas_of(engine, PROMPTS[4:] * 2) == expected[4:] * 2
        assert engine.get_replica_metrics()["1"]["engine_restarts_total"] == 1
        check_empty(engine, threading.active_count())


@pytest.mark.parametrize("length", [20, 8])
def test_what_a_step_has_read_is_given_out_though_it_takes_its_replica_along(
    tmp_path: Path, length: int
) -> None:
    """A grammar has the step before read, here a token in the middle or the last one, within the next."""
    folder = text_checkpoint(tmp_path / "model")
    held = SamplingParams(
        temperature=0,
        max_tokens=20,
        structured_outputs=StructuredOutputsParams(regex=f"[a-f]{{{length}}}"),
        output_kind=RequestOutputKind.DELTA,
    )
    options = OPTIONS | SIZES | {"skip_tokenizer_init": False, "data_parallel_size": 2}
    with Engine.from_pretrained(str(folder), **options) as engine:
        core = replicas_of(engine).cores[0]
        sample, reset, samples, resets = core.runner.sample, core.runner.reset, [], []

        def sample_failing(*arguments: Any) -> Any:
            samples.append(arguments)
            if len(samples) == 9:
                raise RuntimeError("the device is gone")
            return sample(*arguments)

        def reset_failing() -> None:
            resets.append(())
            if len(resets) == 1:
                raise RuntimeError("the device takes no pages")
            reset()

        core.runner.sample, core.runner.reset = sample_failing, reset_failing
        engine.add_request("held", "abc", held)
        text, end = "", time.monotonic() + SOON
        while engine.has_unfinished_requests():
            assert time.monotonic() < end
            text += "".join(output.outputs[0].text for output in engine.step())
        assert resets
        assert len(text) == length


def test_it_comes_back_while_the_other_serves(
    expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    with replicated() as engine:
        engine.generate(PROMPTS, greedy(2))  # starts all threads
        threads = threading.active_count()
        fault = Fault(engine, 1, after=4)
        fault.can_restart.clear()
        assert deltas_of(engine) == expected
        assert ups(engine) == [1, 0]
        assert engine.num_serving == 1
        figures = engine.get_metrics()
        assert (figures["replicas_failed"], figures["replicas_given_up"]) == (1, 0)
        fault.can_restart.set()
        wait_until(lambda: engine.num_serving == 2)
        before = engine.get_replica_metrics()["1"]
        assert before["engine_restarts_total"] == 1
        assert deltas_of(engine) == expected
        after = engine.get_replica_metrics()["1"]
        assert after["generation_tokens_total"] > before["generation_tokens_total"]
        assert ups(engine) == [1, 1]
        assert engine.get_metrics()["requests_finished_error_total"] == 0
        check_empty(engine, threads)
    messages = [record.message for record in caplog.records]
    assert "replica 1 has failed, and starts over: the device takes no pages" in messages
    assert "replica 1 has started over" in messages


def test_a_restart_that_fails_is_tried_again(expected: list[list[int]]) -> None:
    with replicated() as engine:
        fault = Fault(engine, 0, after=3)
        fault.bad_restarts = 2
        assert deltas_of(engine) == expected
        wait_until(lambda: engine.num_serving == 2)
        assert fault.restarts == 3
        assert engine.get_replica_metrics()["0"]["engine_restarts_total"] == 1
        assert deltas_of(engine) == expected


def test_when_tries_are_used_up_it_stays_out(
    expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    with replicated() as engine:
        engine.limit_restarts(2, 300)
        fault = Fault(engine, 1, after=4)
        fault.bad_restarts = 10**6
        assert deltas_of(engine) == expected
        wait_until(lambda: engine.get_metrics()["replicas_given_up"] == 1)
        assert deltas_of(engine) == expected
        assert fault.restarts == 2
        assert [engine.get_replica_metrics()[name]["replica_given_up"] for name in "01"] == [0, 1]
        [record] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
        assert record.message == "replica 1 has failed too often, and is given up"
        fault.bad_restarts = 0
        engine.restart()  # all of them
        assert ups(engine) == [1, 1]
        assert engine.get_metrics()["replicas_given_up"] == 0
        assert deltas_of(engine) == expected


def test_while_both_start_over_requests_wait(expected: list[list[int]]) -> None:
    """The second fails while the first starts over: who waits goes on, others may leave."""

    async def main() -> None:
        with_replicas = replicated()
        faults = [Fault(with_replicas, index, after=6 + 4 * index) for index in (0, 1)]
        for fault in faults:
            fault.can_restart.clear()
        async with AsyncEngine(with_replicas) as engine:
            asked = [asyncio.create_task(last(engine.generate(prompt, LONG))) for prompt in PROMPTS]
            left = asyncio.create_task(last(engine.generate(PROMPTS[0], greedy(40), request_id="left")))
            while engine.health != "restarting":
                await asyncio.sleep(0.002)
            assert engine.num_serving == 0
            assert await engine.abort("left")
            assert (await left).outputs[0].finish_reason == "abort"
            faults[1].bad_restarts = 1
            faults[1].can_restart.set()
            while engine.num_serving == 0:
                await asyncio.sleep(0.002)
            assert engine.health == "running"
            found = await asyncio.gather(*asked)
            assert [list(output.outputs[0].token_ids) for output in found] == expected
            faults[0].can_restart.set()
            while engine.num_serving == 1:
                await asyncio.sleep(0.002)
            figures = engine.get_metrics()
            assert figures["requests_finished_error_total"] == figures["pages_used"] == 0
            assert figures["engine_restarts_total"] == 2

    asyncio.run(asyncio.wait_for(main(), 60))


def test_when_all_are_given_up_the_engine_starts_over(expected: list[list[int]]) -> None:
    """Also where nobody waits for anything any more."""

    async def main() -> None:
        with_replicas = replicated()
        faults = [Fault(with_replicas, index, after=2) for index in (0, 1)]
        for fault in faults:
            fault.bad_restarts = 2  # all that a replica has
            fault.can_restart.clear()
        async with AsyncEngine(with_replicas, max_restarts=2) as engine:
            stream = await engine.submit({"one": await engine.make_input(PROMPTS[0], LONG)})
            while engine.health != "restarting":
                await asyncio.sleep(0.002)
            stream.close()
            while with_replicas.has_unfinished_requests():
                await asyncio.sleep(0.002)
            for fault in faults:
                fault.can_restart.set()
            while engine.health == "restarting":
                await asyncio.sleep(0.002)
            assert engine.health == "running"
            assert [fault.restarts for fault in faults] == [3, 3]
            output = await last(engine.generate(PROMPTS[1], LONG))
            assert list(output.outputs[0].token_ids) == expected[1]

    asyncio.run(asyncio.wait_for(main(), 60))


async def last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    return [output async for output in outputs][-1]


def test_a_pause_holds_up_neither_sleep_nor_the_end(
    expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, threads = time.monotonic(), threading.active_count()
    with replicated() as engine:
        fault = Fault(engine, 0, after=3)
        fault.bad_restarts = 1
        monkeypatch.setattr(restarts, "FIRST_PAUSE", 600.0)
        assert deltas_of(engine) == expected
        wait_until(lambda: fault.restarts == 1)
        engine.sleep()
        assert ups(engine) == [0, 1]
        engine.wake_up()
        monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.0)
        assert deltas_of(engine) == expected  # its first step has the replica go on
        wait_until(lambda: engine.num_serving == 2)
        again = Fault(engine, 1, after=0)
        monkeypatch.setattr(restarts, "FIRST_PAUSE", 600.0)
        again.bad_restarts = 1
        assert deltas_of(engine) == expected
        wait_until(lambda: again.restarts == 1)
    assert time.monotonic() - begin < 60
    wait_until(lambda: threading.active_count() <= threads + 2)  # those of jax


def test_pauses_grow_until_restarts_are_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.5)
    now = [0.0]
    budget = RestartBudget(10, 60, lambda: now[0])
    pauses = []
    while budget.take():
        pauses.append(budget.pause)
    assert pauses == [0, 0.5, 1, 2, 4, 8, 16, 32, 32, 32]
    now[0] = 61
    assert budget.take()
    assert budget.pause == 0


def test_what_may_not_start_over_stays_as_it_is() -> None:
    error, stopped = RuntimeError("no device"), threading.Event()
    assert RestartBudget(0).start_over("it", pytest.fail, error, stopped) is error
    stopped.set()
    assert RestartBudget(9).start_over("it", pytest.fail, error, stopped) is error
