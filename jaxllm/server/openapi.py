"""`/openapi.json`: what FastAPI finds out by itself, and what it cannot know: errors, streams, names.

https://spec.openapis.org/oas/v3.1.1.html
"""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from jaxllm.server.errors import ANTHROPIC_PATH
from jaxllm.server.rate_limits import LIMITED
from jaxllm.server.response_types import ResponseStreamEvent

ERRORS = {
    400: "Something in the request cannot be served; the message names it and says what to do.",
    401: "There is no valid key.",
    404: "There is no such model or answer.",
    408: "The request took longer than its time limit.",
    409: "Not while requests are running.",
    413: "The body is too long.",
    429: "The key has used up its requests or tokens of this minute; Retry-After says when to try again.",
    431: "The headers are too long.",
    500: "Something failed on the server; its log has the cause.",
    503: "The engine cannot serve now, or too many wait; Retry-After says when to try again.",
}
"""What errors mean, by status."""

EVERYWHERE = (401, 431, 500)
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
"""Paths that give a stream of events where one is asked for."""
ADMIN = ("/sleep", "/wake_up", "/is_sleeping", "/reset_prefix_cache", "/start_profile", "/stop_profile")
PROBES = ("/health", "/ping", "/ready")
PLAIN = {"/metrics": "text/plain"}
"""Paths whose answers are not JSON."""
EVENT = {
    "title": "ServerSentEvent",
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
"""https://spec.openapis.org/oas/v3.2.0.html#sequential-media-types; `data` is JSON or OpenAI's [DONE]."""
RESPONSES = "/v1/responses"
REFERENCES = "#/components/schemas/{model}"


def install(app: FastAPI) -> None:
    """Has the app describe itself in this way."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = describe  # pyright: ignore[reportAttributeAccessIssue] - FastAPI's own way


def _describe(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    names: set[str] = set()
    for path, method, operation in _operations(document):
        operation["operationId"] = _name(operation["operationId"], path, method, names)
        _correct_answers(path, method, operation)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # errors of this form are never given
        schemas.pop(name, None)
    schemas["AnthropicError"] = _ANTHROPIC_ERROR
    events = TypeAdapter(ResponseStreamEvent).json_schema(ref_template=REFERENCES)
    schemas |= events.pop("$defs")
    schemas["ResponseStreamEvent"] = events
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer"},
        "key_header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    document["security"] = [{"key": []}, {"key_header": []}, {}]
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def _name(given: str, path: str, method: str, names: set[str]) -> str:
    """The endpoint's name, without the path that FastAPI adds to it."""
    suffix = "".join(c if c.isalnum() else "_" for c in path)
    name = given.removesuffix(f"_{method}").removesuffix(suffix)
    name = f"{name}_{method}" if name in names else name
    names.add(name)
    return name


def _correct_answers(path: str, method: str, operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    good = answers["200"]
    good["description"] = "What was asked for."
    if path in GENERATING:
        good["content"]["text/event-stream"] = {"itemSchema": _RESPONSE_EVENT if path == RESPONSES else EVENT}
    if path in PLAIN:
        good["content"] = {PLAIN[path]: {"schema": {"type": "string"}}}
    for status in _statuses(path, method, operation):
        schema = "AnthropicError" if ANTHROPIC_PATH in path else "ErrorResponse"
        form: Any = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
        if path in PROBES and status == 503:
            form = good["content"]["application/json"]
        answers[str(status)] = {"description": ERRORS[status], "content": {"application/json": form}}
    operation["responses"] = dict(sorted(answers.items()))


def _statuses(path: str, method: str, operation: dict[str, Any]) -> Iterator[int]:
    """The errors that may come."""
    yield from EVERYWHERE
    if "requestBody" in operation:
        yield from (400, 404, 413, 503)
    if method == "post" and path.startswith(LIMITED):
        yield 429
    if path in GENERATING:
        yield 408
    if path in ADMIN:
        yield from (400, 409, 503)
    if path in PROBES:
        yield 503
    if "{" in path:
        yield 404


_RESPONSE_EVENT = {
    **EVENT,
    "properties": {
        "event": {"type": "string", "description": "The type of the data, once more."},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": REFERENCES.format(model="ResponseStreamEvent")},
        },
    },
}
_ANTHROPIC_ERROR = {
    "title": "AnthropicError",
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
    },
    "required": ["type", "error"],
}
"""https://docs.anthropic.com/en/api/errors"""
