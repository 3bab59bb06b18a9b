"""Errors as the OpenAI API gives them.

https://platform.openai.com/docs/guides/error-codes: a status, and a body with `message`, `type`, `param` and
`code`.
"""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from jaxllm.engine.core import EngineFailedError, RequestFailedError

logger = logging.getLogger(__name__)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
"""What OpenAI's clients find in `type`, by status."""

ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""What Anthropic's clients find in `type`, by status."""

TOO_LONG = "maximum context length is"
"""What messages say, as OpenAI's, of prompts and outputs that together are longer than the model's length."""
FORMS = {
    "prompt": "must be text, a list of token ids, or a list of several of these",
    "stop": "must be a string or a list of strings",
}
"""What is said of parameters that may be of several types."""
CONSTRAINT = "structured_outputs"
"""What the engine calls that which an output is held to."""
_FIELD = re.compile(r"^\.\w+")
"""The constraint's kind, which is a field of that parameter alone."""
_NAMED = re.compile(r"([A-Za-z_]\w*)[\[\w\]\"'.]*\s*[:=]")


class ErrorBody(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """The body of an answer that is an error."""

    error: ErrorBody


class ApiError(Exception):
    """An answer with an error's status. The message is for the client; `kind` is its `type` for OpenAI's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind or TYPES.get(status, "server_error")
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> ErrorResponse:
        """The error as JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """The error as JSON in Anthropic's form: https://docs.anthropic.com/en/api/errors"""
        kind = ANTHROPIC_TYPES.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str) -> JSONResponse:
        """The error as an answer, in the form that a path's clients expect."""
        anthropic = ANTHROPIC_PATH in path  # a proxy's path may come before it
        return JSONResponse(self.anthropic_body() if anthropic else self.body(), self.status, self.headers)


def unavailable(message: str, *, retry_after: int = 1, code: str | None = None) -> ApiError:
    """503, with the seconds after which it is worth another try."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after)})


def bad_value(error: TypeError | ValueError, known: Collection[str], rename: Mapping[str, str]) -> ApiError:
    """400 for what the engine refuses. Its messages begin with the parameter's name.

    Args:
        error: from the engine's checks, whose messages are written for its users.
        known: the request's parameters.
        rename: the engine's names of parameters that are called something else in the request.
    """
    message = str(error)
    found = _NAMED.match(message)
    name = found[1] if found else ""
    param = rename.get(name, name)
    if param != name:
        rest = message[len(name) :]
        message = param + (_FIELD.sub("", rest) if name == CONSTRAINT else rest)
    too_long = TOO_LONG in message or (
        "max_model_len" in message and param in ("prompt", "messages", "input")
    )
    code = "context_length_exceeded" if too_long else None
    return ApiError(400, message, param=param if param in known else None, code=code)


def of_exception(error: BaseException, request_id: str) -> ApiError:
    """What a client is told of an exception: of our own faults only the id to look for in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineFailedError):
        return unavailable("the engine failed before the request was done; try again", retry_after=5)
    if not isinstance(error, RequestFailedError):
        logger.error("request %s failed", request_id, exc_info=error)
    return ApiError(500, f"the request failed on the server; its log has the cause beside {request_id}")


def install(app: FastAPI) -> None:
    """Has the app give every error in this form."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> JSONResponse:
        return error.response(request.scope["path"])

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error).response(request.scope["path"])

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        message = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not served here"}
        text = message.get(error.status_code, str(error.detail))
        found = ApiError(error.status_code, text, headers=error.headers)
        route = getattr(request.scope.get("route"), "path", "")
        if error.status_code == 405 and (served := app.openapi()["paths"].get(route)):
            # the router knows those of one endpoint, but a path may have several
            found.headers["allow"] = ", ".join(method.upper() for method in served)
        return found.response(request.scope["path"])


def _of_validation(error: RequestValidationError) -> ApiError:
    """400, naming the first field that is wrong; values are not repeated, they may be long or secret."""
    first: Any = error.errors()[0]
    where = [part for part in first["loc"] if part != "body"]
    names = [str(part) for part in where if not (isinstance(part, str) and not part.isidentifier())]
    name = "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in names).lstrip(".")
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])  # which may look like anything
        text = f"{name or unknown[:200]}: this server does not know this parameter; leave it out"
        return ApiError(400, text, param=names[0] if names else unknown[:200], code="unknown_parameter")
    if isinstance(error.body, bytes):  # it was not read as JSON
        text = "content-type: must be application/json, as the body is; send that header"
        return ApiError(400, text, param="content-type")
    if first["type"] == "missing":
        text = f"{name or 'the body'}: is required"
        return ApiError(400, text, param=name or None, code="missing_required_parameter")
    if first["type"] == "refused":
        return ApiError(400, first["msg"], param=first["ctx"]["param"], code="unsupported_parameter")
    if first["type"] == "model_attributes_type":
        text = f"{name or 'the body'}: must be a JSON object"
        return ApiError(400, text, param=names[0] if names else None)
    text = first["msg"].removeprefix("Value error, ")
    if not names:
        found = _NAMED.match(text)
        return ApiError(400, text, param=found[1] if found else None)
    if names[0] in FORMS:
        return ApiError(400, f"{names[0]}: {FORMS[names[0]]}", param=names[0])
    return ApiError(400, f"{name}: {text}", param=names[0])
