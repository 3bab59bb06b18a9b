"""Faults in every stage: a request's own ends that request, others end all and it comes back."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from running import Running

from jaxllm.engine import async_engine
from jaxllm.engine.core import EngineCore
from jaxllm.engine.detokenizer import Detokenizer
from jaxllm.engine.output_stream import OutputStream
from jaxllm.runner.runner import DispatchedStep

LONG = {"prompt": "abc", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
POISON = LONG | {"prompt": "poison", "request_id": "poison"}
COUNTS = ("requests_running", "requests_waiting", "pages_used", "programs_compiled_late_total")


@pytest.fixture
def before(server: Running) -> Iterator[dict[str, Any]]:
    """How things stand, and shall stand afterwards: counts, threads, and what is answered."""
    assert server.service.engine._engine.wait_for_programs(60)
    ask_all(server, *[LONG] * 16)  # starts all threads of the pool that tokenizes
    text = server.post("/v1/completions", **LONG).json()["choices"][0]["text"]
    server.wait_idle()
    found, threads = server.figures(), threading.active_count()
    yield found
    wait_until(lambda: server.http.get("/health").is_success)
    again = server.post("/v1/completions", **LONG)
    assert again.json()["choices"][0]["text"] == text
    server.wait_idle()
    assert {name: server.figures()[name] for name in COUNTS} == {name: found[name] for name in COUNTS}
    assert threading.active_count() <= threads
    assert server.service.active == server.service.requests == 0


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: Any, after: int = 3) -> None:
    """Has a method, or a function in a dict, fail at one of its calls, after it has done its work."""
    real, calls = owner[name] if isinstance(owner, dict) else getattr(owner, name), iter(range(10**9))

    def fail(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        if next(calls) == after:
            raise RuntimeError("secret detail")
        return result

    replace = monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr
    replace(owner, name, fail)


def for_poison(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, told: Callable[..., bool]) -> None:
    """Has a method fail whenever it works for the request that is called poison."""
    real = getattr(owner, name)

    def fail(*args: Any, **options: Any) -> Any:
        if told(*args):
            raise RuntimeError("secret detail")
        return real(*args, **options)

    monkeypatch.setattr(owner, name, fail)


def ask_all(server: Running, *bodies: dict[str, Any]) -> list[tuple[int, str]]:
    """Asks for all at once; their statuses and bodies. A stream that ends with an error counts as 500."""

    async def ask(http: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[int, str]:
        answer = await http.post("/v1/completions", json=body)
        failed = answer.status_code == 200 and '"error":{' in answer.text
        return 500 if failed else answer.status_code, answer.text

    async def main() -> list[tuple[int, str]]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
            return await asyncio.gather(*(ask(http, body) for body in bodies))

    found = asyncio.run(main())
    for status, text in found:
        assert "secret" not in text
        assert status == 200 or '"type":"se' in text  # server_error, service_unavailable_error
    return found


@pytest.mark.parametrize("stage", ["tokenize", "inputs", "admit", "detokenize", "logprobs", "deliver"])
def test_a_fault_of_one_request_is_its_own(
    server: Running, before: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    engine: Any = server.service.engine._engine
    body = POISON
    match stage:
        case "tokenize":
            for_poison(monkeypatch, engine._inputs, "_encode", lambda text: "poison" in text)
        case "inputs":
            for_poison(monkeypatch, engine._inputs, "_check_length", lambda n: n == 6)
            body = POISON | {"prompt": [5] * 6}
        case "admit":
            for_poison(monkeypatch, engine._core.scheduler, "add", lambda r: r.request_id == "poison/1")
            body = POISON | {"n": 2, "temperature": 1}
        case "detokenize":
            for_poison(monkeypatch, Detokenizer, "update", lambda self, *_: self._min_tokens == 7)
            body = POISON | {"min_tokens": 7}
        case "logprobs":
            scored = engine._core.vocabulary
            for_poison(monkeypatch, scored, "decode_token", lambda token, _: token == 42)
            body = POISON | {"prompt": [5, 42, 42, 7], "prompt_logprobs": 0}
        case "deliver":
            for_poison(monkeypatch, OutputStream, "put", lambda self, request_id, _: request_id == "poison")
    others = [LONG, LONG | {"stream": True}]
    (poisoned_status, _), *rest = ask_all(server, body, *others)
    assert poisoned_status == 500
    assert [status for status, _ in rest] == [200, 200]
    assert server.figures()["engine_restarts_total"] == before["engine_restarts_total"]
    assert server.http.get("/health").is_success


@pytest.mark.parametrize("stage", ["pack", "forward", "sample", "read"])
def test_a_fault_of_a_step_ends_its_requests(
    server: Running, before: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    core = server.service.engine._engine._core
    assert isinstance(core, EngineCore)
    match stage:
        case "pack":
            once(monkeypatch, core.runner, "_choose_bucket")
        case "forward" | "sample":  # it has taken the pages, and nobody has got them back
            compiled = core.runner.programs._compiled
            for key in [key for key in compiled if isinstance(key, tuple) and key[0] == stage]:
                once(monkeypatch, compiled, key)
        case "read":
            once(monkeypatch, DispatchedStep, "read")
    statuses = [status for status, _ in ask_all(server, LONG, LONG | {"stream": True})]
    assert 500 in statuses
    assert server.figures()["engine_restarts_total"] == before["engine_restarts_total"]


@pytest.mark.parametrize("stage", ["schedule", "complete", "post", "steps", "reset"])
def test_a_fault_of_the_loop_ends_all_and_it_comes_back(
    server: Running, before: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    core = server.service.engine._engine._core
    assert isinstance(core, EngineCore)
    match stage:
        case "schedule":
            once(monkeypatch, core.scheduler, "schedule")
        case "complete":
            once(monkeypatch, core.metrics, "step_done")
        case "post":
            once(monkeypatch, async_engine, "post")
        case "steps":  # several in a row

            def fail(*_args: Any, **_options: Any) -> Any:
                if core.metrics._totals["engine_restarts"] == before["engine_restarts_total"]:
                    raise RuntimeError("secret detail")
                return dispatch(*_args, **_options)

            dispatch = core.runner.dispatch
            monkeypatch.setattr(core.runner, "dispatch", fail)
        case "reset":  # the first restart fails as well
            once(monkeypatch, core.scheduler, "schedule")
            once(monkeypatch, core.runner, "reset", after=0)
    bodies = [LONG | {"stream": number % 2 == 0} for number in range(16)]
    statuses = [status for status, _ in ask_all(server, *bodies)]
    assert set(statuses) & {500, 503}
    wait_until(lambda: server.service.status == "ready")
    assert server.figures()["engine_restarts_total"] == before["engine_restarts_total"] + 1


def test_while_it_starts_over_it_says_so(
    server: Running, before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = server.service.engine._engine
    go_on, restart = threading.Event(), engine.restart

    def wait() -> None:
        assert go_on.wait(20)
        restart()

    monkeypatch.setattr(engine, "restart", wait)
    once(monkeypatch, engine._core.scheduler, "schedule")
    [(status, _)] = ask_all(server, LONG)
    assert status == 503
    assert server.http.get("/health").status_code == 503
    assert server.http.get("/health").json() == {"status": "restarting"}
    refused = server.post("/v1/completions", **LONG)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    go_on.set()
