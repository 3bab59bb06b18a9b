"""An ASGI application called without a socket: one request in, the messages of its answer out."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp, Message


async def call_app(app: ASGIApp, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
    """Yields the messages that an application sends. Whoever stops reading is a client that has left.

    Raises:
        Exception: what the application raised.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if request:
            return request.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, receive, send)
        finally:
            sent.put_nowait(None)

    async def send(message: Message) -> None:
        sent.put_nowait(message)

    task = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            yield message
        await task
    finally:
        gone.set()  # the application ends the request by itself, and what it holds
        await asyncio.wait([task])
