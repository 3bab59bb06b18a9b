"""A server under load: requests arrive at a rate or wait for a free client, and their streams are timed.

Any server with OpenAI's completions and chats can be measured. All times are the client's own, so they
include the network and the client's work; latencies count from when a request was due.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from jaxllm.bench.figures import percentiles
from jaxllm.bench.workload import Item, with_arrivals

WARM_REQUESTS, WARM_TOKENS = 2, 8
"""What runs before anything is timed."""


@dataclass
class Answer:
    """What became of one request; times are seconds of the client's clock.

    Attributes:
        due: when it was to be sent.
        arrivals: when something came, and how many tokens that was.
        prompt_tokens: as the server counts them.
        error: why it failed, if it did.
    """

    due: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    end: float = 0.0
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens that came."""
        return sum(tokens for _, tokens in self.arrivals)

    @property
    def first_token_time(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0][0] - self.due

    @property
    def time_per_token(self) -> float:
        """Mean seconds from a token to the next."""
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.output_tokens - 1)

    def latencies(self) -> list[float]:
        """Seconds from each token to the next; those that come together share the time."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(now - before) / tokens for (before, _), (now, tokens) in pairs for _ in range(tokens)]


@dataclass(frozen=True)
class Load:
    """How requests come.

    Attributes:
        rate: random arrivals a second; None: all at once.
        concurrency: most requests under way; None: no limit.
    """

    rate: float | None
    concurrency: int | None

    def __str__(self) -> str:
        rate = "at once" if self.rate is None else f"{self.rate:g}/s"
        return rate if self.concurrency is None else f"{rate}, {self.concurrency} clients"


class Target:
    """The server.

    Args:
        url: where it is, without /v1.
        model: the name to ask for; None: the server's first.
        key: an API key.
        timeout: most seconds without anything coming.
    """

    def __init__(self, url: str, model: str | None, key: str | None, timeout: float = 600.0) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(
            base_url=url.rstrip("/"), headers=headers, timeout=timeout, limits=limits
        )
        self._model = model
        self._salt = ""

    async def connect(self) -> str:
        """Finds out what is served.

        Raises:
            RuntimeError: the server cannot be reached, or does not serve the model.
        """
        try:
            response = await self._client.get("/v1/models")
            response.raise_for_status()
        except httpx2.HTTPError as error:
            raise RuntimeError(f"{self._client.base_url}: {error}") from error
        names = [model["id"] for model in response.json()["data"]]
        self._model = self._model or names[0]
        if self._model not in names:
            raise RuntimeError(f"{self._model!r} is not served there; {', '.join(names)} is")
        return self._model

    async def run(self, items: Sequence[Item], load: Load) -> list[Answer]:
        """Sends the requests, each when it is due and a client is free, and waits for all answers."""
        if load.rate is not None:
            items = with_arrivals(items, load.rate)
        free = asyncio.Semaphore(load.concurrency or len(items))
        self._salt = uuid.uuid4().hex
        start = time.perf_counter()

        async def one(item: Item) -> Answer:
            await asyncio.sleep(max(0.0, start + item.due - time.perf_counter()))
            begin = start + item.due
            async with free:
                # where requests come at once, one that waits for a client has not been sent yet
                answer = Answer(begin if load.rate is not None else time.perf_counter())
                try:
                    await self._stream(item, answer)
                except (httpx2.HTTPError, RuntimeError) as error:
                    answer.error = str(error) or type(error).__name__
                answer.end = time.perf_counter()
            return answer

        return await asyncio.gather(*map(one, items))

    async def _stream(self, item: Item, answer: Answer) -> None:
        path, body = self._request(item)
        async with self._client.stream("POST", path, json=body) as response:
            if not response.is_success:
                raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:200]}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    self._note(json.loads(line.removeprefix("data: ")), answer)

    def _request(self, item: Item) -> tuple[str, dict[str, Any]]:
        body = {
            "model": self._model,
            "max_tokens": item.output_len,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "cache_salt": self._salt,  # a load finds nothing of the one before in the prefix cache
        }
        if item.is_chat:
            return "/v1/chat/completions", body | {"messages": item.prompt}
        return "/v1/completions", body | {"prompt": item.prompt}

    @staticmethod
    def _note(chunk: Mapping[str, Any], answer: Answer) -> None:
        if "error" in chunk:
            raise RuntimeError(chunk["error"]["message"])
        if chunk.get("usage"):
            answer.prompt_tokens = chunk["usage"]["prompt_tokens"]
        for choice in chunk["choices"]:
            if tokens := len(choice.get("token_ids") or ()):
                answer.arrivals.append((time.perf_counter(), tokens))

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()


async def measure(target: Target, items: Sequence[Item], loads: Sequence[Load]) -> dict[str, Any]:
    """Runs the requests under each load in turn.

    Returns:
        For each load, by its name, the figures of `figures`.
    """
    try:
        model = await target.connect()
        few = [Item(item.prompt, min(WARM_TOKENS, item.output_len)) for item in items[:WARM_REQUESTS]]
        await target.run(few, Load(None, None))
        found: dict[str, Any] = {"benchmark": "serve", "model": model}
        for load in loads:
            found[str(load)] = figures(await target.run(items, load))
        return found
    finally:
        await target.close()


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """What was measured, in seconds and tokens.

    Raises:
        RuntimeError: every request failed.
    """
    done = [answer for answer in answers if answer.error is None and answer.arrivals]
    if not done:
        raise RuntimeError(f"every request failed: {answers[0].error or 'no token came'}")
    seconds = max(answer.end for answer in answers) - min(answer.due for answer in answers)
    output, prompt = (sum(getattr(a, f"{kind}_tokens") for a in done) for kind in ("output", "prompt"))
    return {
        "seconds": seconds,
        "requests": len(answers),
        "failed": len(answers) - len(done),
        "first_error": next((answer.error for answer in answers if answer.error), None),
        "requests_per_second": len(done) / seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (prompt + output) / seconds,
        "ttft_seconds": percentiles([answer.first_token_time for answer in done]),
        "tpot_seconds": percentiles([a.time_per_token for a in done if a.output_tokens > 1]),
        "itl_seconds": percentiles([latency for answer in done for latency in answer.latencies()]),
        "e2e_seconds": percentiles([answer.end - answer.due for answer in done]),
    }
