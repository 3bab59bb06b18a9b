"""Rounds of clients of every kind, while things break: who leaves, who asks for nonsense, who is late.

`python tests/server/chaos.py [CLIENTS] [ROUNDS]` runs as many as it is told and says what has grown.
"""

import asyncio
import random
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest

sys.path.append(str(Path(__file__).parent.parent / "engine"))  # its small checkpoints

from running import Running, running

from jaxllm.engine import async_engine, restarts
from jaxllm.engine.detokenizer import Detokenizer
from jaxllm.engine.output_stream import OutputStream
from jaxllm.runner.runner import DispatchedStep

KINDS = {"leave": 10, "bad": 5, "late": 5, "stream": 40, "whole": 40}
"""Shares of the kinds of clients, in percent."""
POOLS = ("asyncio_", "uvloop_", "AnyIO")
BAD = ({"temperature": -1}, {"x": 1}, {"prompt": []}, {"logit_bias": {"9999": 1}}, {"max_tokens": "5"})


def faults(server: Running) -> list[tuple[Any, str]]:
    """What may fail: tokenizing, admitting, planning, packing, sampling, reading, text, and giving out."""
    engine: Any = server.service.engine._engine
    core = engine._core
    return [
        (engine._inputs, "_encode"),
        (core.scheduler, "add"),
        (core.scheduler, "schedule"),
        (core.runner, "dispatch"),
        (core.runner, "sample"),
        (DispatchedStep, "read"),
        (core.metrics, "step_done"),
        (Detokenizer, "update"),
        (OutputStream, "put"),
        (async_engine, "post"),
    ]


def break_once(patch: pytest.MonkeyPatch, owner: Any, name: str, after: int) -> None:
    """Has a method fail at one of its calls."""
    real, calls = getattr(owner, name), iter(range(10**9))

    def fail(*args: Any, **options: Any) -> Any:
        if next(calls) == after:
            raise RuntimeError("broken on purpose")
        return real(*args, **options)

    patch.setattr(owner, name, fail)


async def ask(http: httpx2.AsyncClient, draw: random.Random, number: int) -> str:
    """One client; what it was and what became of it."""
    [kind] = draw.choices(list(KINDS), list(KINDS.values()))
    body: dict[str, Any] = {"prompt": f"client {number}", "max_tokens": draw.randint(1, 40)}
    await asyncio.sleep(draw.random() * 0.5)
    if kind == "bad":
        refused = await http.post("/v1/completions", json=body | draw.choice(BAD))
        assert refused.status_code in (400, 503)
        return f"bad {refused.status_code}"
    headers = {"x-request-timeout": "0.02"} if kind == "late" else {}
    if kind in ("late", "whole"):
        answer = await http.post("/v1/completions", json=body | {"n": draw.randint(1, 2)}, headers=headers)
        assert answer.status_code in (200, 500, 503, 408 if kind == "late" else 200)
        assert answer.status_code == 200 or answer.json()["error"]["message"]
        return f"{kind} {answer.status_code}"
    body |= {"stream": True, "max_tokens": 60, "ignore_eos": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            assert response.status_code in (500, 503)
            return f"{kind} {response.status_code}"
        lines = []
        async for line in response.aiter_lines():
            lines += [line] if line else []
            if kind == "leave" and len(lines) > 3:
                return kind
        assert lines[-1] == "data: [DONE]"
        return f"{kind} failed" if '"error":{' in lines[-2] else f"{kind} 200"


def run_round(server: Running, seed: int, clients: int, broken: int) -> Counter[str]:
    """Lets clients ask all at once while some things break; afterwards everything is as before."""
    draw = random.Random(seed)

    async def main() -> list[str]:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            return await asyncio.gather(*(ask(http, draw, number) for number in range(clients)))

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in draw.sample(faults(server), broken):
            break_once(patch, owner, name, after=draw.randint(1, 2 * clients))
        found = Counter(asyncio.run(main()))
        server.wait_idle(60)
    figures = server.figures()
    assert figures["requests_running"] == figures["requests_waiting"] == figures["pages_used"] == 0
    assert server.service.active == server.service.requests == 0
    return found


def threads() -> int:
    """Threads besides those of event loops' pools, which are made when there is something for them to do."""
    return sum(not thread.name.startswith(POOLS) for thread in threading.enumerate())


def resident() -> int:
    """Bytes of memory that the process holds."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def main(clients: int, rounds: int) -> None:
    """Runs rounds and says what has grown."""
    import tempfile

    from small_text import text_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        options = {"max_engine_restarts": 10**6, "max_num_queued_reqs": 2 * clients}
        restarts.FIRST_PAUSE = 0.0
        with running(text_checkpoint(Path(folder) / "model"), **options) as server:
            for number in range(rounds):
                found = run_round(server, number, clients, broken=3)
                restarted = server.figures()["engine_restarts_total"]
                print(
                    f"round {number}: {resident() / 2**20:.0f} MiB, {threads()} threads, "
                    f"{restarted:.0f} restarts, {dict(sorted(found.items()))}",
                    flush=True,
                )


if __name__ == "__main__":
    given = dict(zip(("clients", "rounds"), map(int, sys.argv[1:]), strict=False))
    main(**({"clients": 200, "rounds": 10} | given))
