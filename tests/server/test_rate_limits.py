"""Each key has so many requests and tokens a minute, is told what is left, and takes nothing from others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import pytest
from running import Running, server_config

from jaxllm.server.errors import ApiError
from jaxllm.server.keys import KeyMiddleware, Keys
from jaxllm.server.rate_limits import Account, Bucket, RateLimitMiddleware

BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}


def test_what_is_spent_comes_back_within_a_minute() -> None:
    now = [0.0]
    bucket = Bucket(30, lambda: now[0])
    bucket.spend(40)
    assert (bucket.left, bucket.wait(1), bucket.wait(99)) == (-10, 22, 80)
    now[0] = 22
    assert bucket.left == pytest.approx(1)
    now[0] = 500
    assert (bucket.left, bucket.wait(30)) == (30, 0)


def test_an_account() -> None:
    now = [0.0]
    account = Account(2, 100, lambda: now[0])
    account.begin()
    account.begin()
    with pytest.raises(ApiError, match="2 requests a minute: 0 are left; try again in 30 s") as refused:
        account.begin()
    assert refused.value.body()["error"]["type"] == "requests"
    now[0] = 60
    account.read(90)
    with pytest.raises(ApiError, match="10 are left, and 20 are needed; try again in 6 s"):
        account.read(20)
    with pytest.raises(ApiError, match="101 are needed; that is more than a minute brings"):
        account.read(101)
    account.write(70)
    with pytest.raises(ApiError, match="0 are left; try again in 37 s") as refused:
        account.begin()
    assert refused.value.headers["Retry-After"] == "37"
    Account(None, None).begin()


@asynccontextmanager
async def limited(server: Running, **limits: int | None) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the server behind limits, for the keys a and b."""
    app = KeyMiddleware(RateLimitMiddleware(server.app, **limits), Keys(["a", "b"]))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://server") as client:
        yield client


def test_requests_of_a_key(server: Running) -> None:
    async def main() -> None:
        async with limited(server, requests=2, tokens=None) as client:

            async def ask(key: str, path: str = "/v1/completions") -> httpx2.Response:
                return await client.post(path, json=BODY, headers={"authorization": f"Bearer {key}"})

            first, second, third = await ask("a"), await ask("a"), await ask("a")
            assert first.headers["x-ratelimit-limit-requests"] == "2"
            assert first.headers["x-ratelimit-remaining-requests"] == "1"
            assert 29 < float(first.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 30
            assert "x-ratelimit-limit-tokens" not in first.headers
            assert second.is_success
            assert third.status_code == 429
            assert third.json()["error"]["code"] == "rate_limit_exceeded"
            assert third.json()["error"]["type"] == "requests"
            assert 1 <= int(third.headers["retry-after"]) <= 30
            other = await ask("a", "/v1/messages")
            assert (other.status_code, other.json()["error"]["type"]) == (429, "rate_limit_error")
            assert (await client.get("/v1/models", headers={"authorization": "Bearer a"})).is_success
            assert (await ask("b")).is_success

    asyncio.run(main())


def test_tokens_of_a_key(server: Running) -> None:
    async def main() -> None:
        async with limited(server, requests=None, tokens=12) as client:

            async def ask(**more: object) -> httpx2.Response:
                return await client.post("/v1/completions", json=BODY | more, headers={"x-api-key": "a"})

            assert (await ask()).headers["x-ratelimit-remaining-tokens"] in ("5", "6")
            async with client.stream(
                "POST", "/v1/completions", json=BODY | {"stream": True}, headers={"x-api-key": "a"}
            ) as response:
                assert response.headers["x-ratelimit-limit-tokens"] == "12"
                await response.aread()
            refused = await ask()
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "tokens"

    asyncio.run(main())
    server.wait_idle()


def test_limits_that_are_none() -> None:
    with pytest.raises(ValueError, match="rate_limit_requests=0"):
        server_config(rate_limit_requests=0)
    assert not server_config().limits.is_rate_limited
