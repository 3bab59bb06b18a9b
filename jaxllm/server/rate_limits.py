"""How much each key may ask for in a minute.

Headers and errors are OpenAI's: https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.server.errors import ApiError

MINUTE = 60.0
LIMITED = ("/v1/", "/tokenize", "/detokenize")
"""What paths begin with whose POST requests count."""

RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}"
    for what in ("limit", "remaining", "reset")
    for kind in ("requests", "tokens")
)


class Bucket:
    """An amount that is spent at once and comes back evenly, all of it within a minute.

    It may be overspent; then nothing is left until it has come back.

    Args:
        limit: the most that can be there, and what a minute brings.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._left = float(limit)
        self._then = clock()

    @property
    def left(self) -> float:
        """What can be spent now; less than 0 where it is overspent."""
        now = self._clock()
        self._left = min(float(self.limit), self._left + (now - self._then) * self.limit / MINUTE)
        self._then = now
        return self._left

    def spend(self, amount: int) -> None:
        """Takes an amount, whether it is there or not."""
        self._left = self.left - amount

    def wait(self, amount: float) -> float:
        """Seconds until an amount is there; if it is more than the limit, until all is."""
        missing = min(amount, self.limit) - self.left
        return max(0.0, missing * MINUTE / self.limit)


class Account:
    """What one key has left.

    Args:
        requests, tokens: how many a minute; None: as many as it likes.
    """

    def __init__(
        self, requests: int | None, tokens: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        limits = {"requests": requests, "tokens": tokens}
        self._buckets = {kind: Bucket(limit, clock) for kind, limit in limits.items() if limit is not None}

    def begin(self) -> None:
        """Counts a request.

        Raises:
            ApiError: 429, there have been too many, or tokens are used up.
        """
        for kind in self._buckets:
            self._check(kind, 1)
        if "requests" in self._buckets:
            self._buckets["requests"].spend(1)

    def read(self, tokens: int) -> None:
        """Counts a prompt's tokens.

        Raises:
            ApiError: 429, there are not as many left.
        """
        if "tokens" in self._buckets:
            self._check("tokens", tokens)
            self.write(tokens)

    def write(self, tokens: int) -> None:
        """Counts tokens that are there already."""
        if "tokens" in self._buckets:
            self._buckets["tokens"].spend(tokens)

    def _check(self, kind: str, wanted: int) -> None:
        bucket = self._buckets[kind]
        if bucket.left >= wanted:
            return
        seconds = math.ceil(bucket.wait(wanted))
        text = f"rate limit of {bucket.limit} {kind} a minute: {max(0, math.floor(bucket.left))} are left"
        text += f", and {wanted} are needed" if wanted > 1 else ""
        text += (
            "; that is more than a minute brings" if wanted > bucket.limit else f"; try again in {seconds} s"
        )
        headers = {"Retry-After": str(max(1, seconds)), **self.headers()}
        raise ApiError(429, text, code="rate_limit_exceeded", kind=kind, headers=headers)

    def headers(self) -> dict[str, str]:
        """How things stand, as OpenAI says it."""
        found = {}
        for kind, bucket in self._buckets.items():
            found[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
            found[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.left)))
            found[f"x-ratelimit-reset-{kind}"] = f"{bucket.wait(bucket.limit):.3f}s"
        return found


class RateLimitMiddleware:
    """Answers 429 to keys that have asked for too much, and tells all others what they have left.

    Without keys everybody shares one account. It goes on with the request, as `account` in its state, for
    whoever counts tokens.
    """

    def __init__(
        self, app: ASGIApp, *, requests: int | None, tokens: int | None, root_path: str = ""
    ) -> None:
        self._app = app
        self._limited = tuple(root_path + path for path in LIMITED)
        self._accounts: defaultdict[str, Account] = defaultdict(lambda: Account(requests, tokens))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or not scope["path"].startswith(self._limited)
        ):
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        account = self._accounts[state.get("key_hash", "")]
        try:
            account.begin()
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        state["account"] = account

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] != 429:
                headers = [(name.encode(), value.encode()) for name, value in account.headers().items()]
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        await self._app(scope, receive, send_with_headers)
