"""Answers as server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

import asyncio
import json
from collections.abc import Iterable
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxllm.engine.outputs import RequestOutput
from jaxllm.server.errors import ApiError, of_exception
from jaxllm.server.generation import ClientGoneError, Generation, while_connected

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip; it keeps proxies from closing a connection that is silent for long."""
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
LINGER_SECONDS = 5.0
"""After the deadline, for a client to read the error; one that does not read at all is then given up."""
DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's streams."""


def event(data: Any, name: str | None = None) -> bytes:
    """One event with JSON as its data."""
    text = _encode(data)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode("utf-8", "replace")


class Encoder(Protocol):
    """Makes the events of one stream."""

    def begin(self) -> Iterable[bytes]:
        """Those before the first output."""
        ...

    def encode(self, prompt: int, output: RequestOutput) -> Iterable[bytes]:
        """Those of what is new of a prompt, by its number."""
        ...

    def end(self) -> Iterable[bytes]:
        """Those after the last output."""
        ...

    def error(self, error: ApiError) -> Iterable[bytes]:
        """Those that end a stream that failed after it had begun."""
        ...


class EventStream(Response):
    """Streams a generation, and closes it when the client leaves, the deadline passes or all is sent.

    A client that reads slowly fills the socket's buffer; then no more is taken from the generation until it
    has read, and what comes meanwhile is joined (see `OutputStream`).
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, encoder: Encoder, keep_alive: float) -> None:
        self.status_code = 200
        self.background = None
        self._generation, self._encoder, self._keep_alive = generation, encoder, keep_alive
        # X-Accel-Buffering tells nginx to pass each event on at once
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer; an ASGI application."""
        async with self._generation as generation:
            try:
                async with asyncio.timeout_at(generation.deadline + LINGER_SECONDS):
                    await while_connected(receive, self._send(generation, send))
            except (ClientGoneError, TimeoutError):
                scope.setdefault("state", {})["gone"] = True
            finally:
                scope.setdefault("state", {})["usage"] = generation.usage()

    async def _send(self, generation: Generation, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        events = self._encoder.begin()
        try:
            while True:
                if data := b"".join(events):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                if generation.finished:
                    break
                outputs = await generation.take(self._keep_alive)
                events = [e for number, output in outputs for e in self._encoder.encode(number, output)]
                if not outputs:
                    events = [KEEP_ALIVE]
            events = self._encoder.end()
        except Exception as error:
            events = self._encoder.error(of_exception(error, generation.id))
        await send({"type": "http.response.body", "body": b"".join(events), "more_body": False})
