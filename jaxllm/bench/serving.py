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
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from jaxllm.bench.figures import percentiles
from jaxllm.bench.workload import Item, with_arrivals
from jaxllm.wording import counted, refusal, unreachable

WARM_REQUESTS, WARM_TOKENS = 2, 8
"""What runs before anything is timed."""


@dataclass
class Answer:
    """What became of one request; times are seconds of the client's clock.

    Attributes:
        due: when it was to be sent.
        pieces: of a stream that have not been read yet, each with when it came.
        arrivals: when something came, and how many tokens that was.
        prompt_tokens: as the server counts them.
        error: why it failed, if it did.
    """

    due: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
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
        return rate if self.concurrency is None else f"{rate}, {counted(self.concurrency, 'client')}"


class Target:
    """The server. To be used in `async with`.

    Args:
        url: where it is, without /v1.
        model: the name to ask for; None: the server's first.
        headers: of every request.
        timeout: most seconds without anything coming.
    """

    def __init__(
        self, url: str, model: str | None, headers: Mapping[str, str], timeout: float = 600.0
    ) -> None:
        self._url = url
        self._proxy = _find_proxy(url)
        self._headers = headers
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        self._model = model
        self._salt = ""

    async def __aenter__(self) -> Self:
        # Not httpx2, which takes 35 us for each piece of an answer where this takes 10: a server on the same
        # cores is the slower for it, and 32 clients of a small model get 1,000 pieces a second.
        self._client = aiohttp.ClientSession(
            headers=self._headers,
            timeout=self._timeout,
            connector=aiohttp.TCPConnector(limit=0),
            proxy=self._proxy,
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.close()

    async def connect(self) -> str:
        """Finds out what is served.

        Raises:
            RuntimeError: the server cannot be reached, refuses, or does not serve the model.
        """
        try:
            async with self._client.get(f"{self._url}/v1/models") as response:
                if not response.ok:
                    raise RuntimeError(f"{self._url}: {response.status}: {refusal(await response.text())}")
                names = [model["id"] for model in (await response.json())["data"]]
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RuntimeError(self._lost(error)) from error
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
                except (aiohttp.ClientError, TimeoutError, RuntimeError) as error:
                    answer.error = self._lost(error)
                answer.end = time.perf_counter()
            return answer

        answers = await asyncio.gather(*map(one, items))
        for answer in answers:
            self._read(answer)
        return answers

    def _lost(self, error: Exception) -> str:
        if isinstance(error, aiohttp.ClientConnectorError):
            through = f" through the proxy {self._proxy}" if self._proxy else ""
            return unreachable(f"{self._url}{through}", error)
        return str(error) or type(error).__name__

    async def _stream(self, item: Item, answer: Answer) -> None:
        path, body = self._request(item)
        async with self._client.post(self._url + path, json=body) as response:
            if not response.ok:
                raise RuntimeError(f"{response.status}: {refusal(await response.text())}")
            async for data in response.content.iter_any():
                answer.pieces.append((time.perf_counter(), data))

    def _read(self, answer: Answer) -> None:
        """Reads what has come; nothing of it had to be known before, and it takes as long as the coming."""
        rest = b""
        for moment, data in answer.pieces:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    self._note(json.loads(line.removeprefix(b"data: ")), moment, answer)
        answer.pieces.clear()

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
    def _note(chunk: Mapping[str, Any], moment: float, answer: Answer) -> None:
        if "error" in chunk:
            answer.error = chunk["error"]["message"]
            return
        if chunk.get("usage"):
            answer.prompt_tokens = chunk["usage"]["prompt_tokens"]
        for choice in chunk["choices"]:
            if tokens := len(choice.get("token_ids") or ()):
                if answer.arrivals and answer.arrivals[-1][0] == moment:  # several events in one piece
                    tokens += answer.arrivals.pop()[1]
                answer.arrivals.append((moment, tokens))


def _find_proxy(url: str) -> str | None:
    """The proxy that the environment names for a server.

    Not aiohttp's `trust_env`: that looks at each request, in a thread, and takes a login from ~/.netrc, too,
    beside which no key can be sent.
    """
    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy is None or proxy_bypass(parts.hostname or ""):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


async def measure(target: Target, items: Sequence[Item], loads: Sequence[Load]) -> dict[str, Any]:
    """Runs the requests under each load in turn.

    Returns:
        For each load, by its name, the figures of `figures`.
    """
    async with target:
        model = await target.connect()
        few = [Item(item.prompt, min(WARM_TOKENS, item.output_len)) for item in items[:WARM_REQUESTS]]
        await target.run(few, Load(None, None))
        found: dict[str, Any] = {"benchmark": "serve", "model": model}
        for load in loads:
            found[str(load)] = figures(await target.run(items, load))
        return found


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
