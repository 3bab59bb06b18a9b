"""What happens to every request before and after its endpoint."""

import logging
import re
import time
import uuid
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.server.errors import ApiError, of_exception
from jaxllm.server.generation import ClientGoneError
from jaxllm.server.http_metrics import HttpMetrics

logger = logging.getLogger("jaxllm.server.requests")

REQUEST_ID = b"x-request-id"
PROBES = ("/health", "/ready", "/ping", "/metrics", "/ui/state")
"""Paths that are asked all the time: their lines in the log are of the level debug."""
GONE = 499
"""The status in the log of requests whose clients left; nginx writes the same."""
_PLAIN_ID = re.compile(rb"[\w.:-]{1,128}")


class RequestMiddleware:
    """Gives each request an id, turns what goes wrong into an answer, and logs and counts it when it is done.

    The id is the client's `X-Request-Id` if it has a plain one, and goes out under the same name.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, *, log: bool) -> None:
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGoneError:
            state["gone"] = True
        except Exception as error:
            if status is not None:
                raise  # the answer has begun: uvicorn closes the connection, which tells the client
            answer = of_exception(error, request_id).response(scope["path"])
            await answer(scope, receive, send_with_id)
        finally:
            seen = GONE if state.get("gone") else status or GONE
            self._done(scope, request_id, seen, time.perf_counter() - begin)

    def _done(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = scope.get("route")
        self._metrics.observe(scope["method"], getattr(route, "path", "none"), status, seconds)
        if not self._log:
            return
        fields: dict[str, Any] = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
        }
        usage = scope["state"].get("usage")
        tokens = ""
        if usage is not None:
            fields |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
            tokens = f", {usage['prompt_tokens']} + {usage['completion_tokens']} tokens"
        if user := scope["state"].get("user"):
            fields["user"] = user
            tokens += f", user {user!r}"
        level = logging.DEBUG if scope["path"].endswith(PROBES) else logging.INFO
        told = (request_id, scope["method"], scope["path"], status, seconds, tokens)
        logger.log(level, "%s %s %r %d in %.3f s%s", *told, extra={"fields": fields})


def _request_id(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == REQUEST_ID]
    if len(given) == 1 and _PLAIN_ID.fullmatch(given[0]):
        return given[0].decode()
    return uuid.uuid4().hex


class RootPathMiddleware:
    """Has every path begin with the root path, as ASGI wants it, whether a proxy has taken that away or not.

    What the others see is one form of both: https://asgi.readthedocs.io/en/latest/specs/www.html
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app, self._root_path, self._raw = app, root_path, root_path.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "http":
            raw = scope["raw_path"]
            if raw != self._raw and not raw.startswith(self._raw + b"/"):
                scope["path"], scope["raw_path"] = self._root_path + scope["path"], self._raw + raw
            scope["root_path"] = self._root_path
        await self._app(scope, receive, send)


class SizeMiddleware:
    """Answers 431 to headers that are too long, and 413 to a body that is, whether it says so or not."""

    def __init__(self, app: ASGIApp, *, max_header_bytes: int, max_body_bytes: int) -> None:
        self._app, self._max_header_bytes, self._max_bytes = app, max_header_bytes, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._max_header_bytes:
            # h11 holds to its limit only where headers come in pieces
            error = ApiError(431, f"the headers are longer than {self._max_header_bytes} bytes")
            await error.response(scope["path"])(scope, receive, send)
            return
        text = f"the body is longer than {self._max_bytes} bytes"
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_bytes:
                error = ApiError(413, text, headers={"Connection": "close"})
                await error.response(scope["path"])(scope, receive, send)
                return
        seen = 0

        async def receive_counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise HTTPException(413, text, {"Connection": "close"})
            return message

        await self._app(scope, receive_counted, send)
