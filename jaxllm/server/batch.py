"""Files of requests in OpenAI's batch format: https://platform.openai.com/docs/guides/batch

Each line of the input is a JSON object with `custom_id`, `method`, `url` and `body`; each line of the output
has the `custom_id` and the `response`, in the order in which they are done.
"""

import asyncio
import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import httpx2

from jaxllm.wording import refusal, unreachable

NO_ROOM = (429, 503)
"""Statuses of requests that may be sent again."""
TRIES = 5
"""How often a request is sent that the server has no room for, or that does not reach it."""
RETRY_SECONDS = 1.0
"""Before the second try; twice as long before each further one, unless the server says how long."""


@dataclass(frozen=True)
class BatchRequest:
    """One line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_requests(path: Path) -> list[BatchRequest]:
    """The requests of a file.

    Raises:
        ValueError: a line that is no request, or a custom_id that comes twice; the message names the line.
        OSError: the file cannot be read.
    """
    found: dict[str, BatchRequest] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            request = _request(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if request.custom_id in found:
            raise ValueError(f"{path}:{number}: custom_id {request.custom_id!r} came before")
        found[request.custom_id] = request
    return list(found.values())


def _request(entry: Any) -> BatchRequest:
    if not isinstance(entry, dict):
        raise ValueError("must be a JSON object")
    missing = [name for name in ("custom_id", "method", "url", "body") if name not in entry]
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing")
    custom_id, url, body = entry["custom_id"], entry["url"], entry["body"]
    if not isinstance(custom_id, str) or not isinstance(body, dict):
        raise ValueError("custom_id must be a string, body an object")
    if entry["method"] != "POST" or not isinstance(url, str) or not url.startswith("/v1/"):
        raise ValueError("method must be POST, url begin with /v1/")
    if body.get("stream"):
        raise ValueError("body.stream: a batch's answers are whole; leave it out")
    return BatchRequest(custom_id, url, body)


def read_done(path: Path) -> set[str]:
    """The custom_ids that an output file has answers of.

    Other lines are taken out of it: those of requests that did not reach the server or that it had no room
    for, and a last one that was not finished.

    Raises:
        ValueError: a line that is no answer.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    done, kept = set[str](), list[bytes]()
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(keepends=True), start=1):
        try:
            entry = json.loads(line)
            custom_id, response = entry["custom_id"], entry["response"]
            if response is not None and response["status_code"] not in NO_ROOM:
                done.add(custom_id)
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not an answer of a batch; give another file") from error
    if (answered := b"".join(kept)) != data:
        rest = path.with_name(f"{path.name}.part")
        rest.write_bytes(answered)
        rest.replace(path)  # whole or not at all
    return done


async def run_batch(
    client: httpx2.AsyncClient,
    requests: Sequence[BatchRequest],
    output: TextIO,
    *,
    concurrency: int,
    note: Callable[[], object] = lambda: None,
) -> list[str]:
    """Sends requests, and writes each answer as soon as it is there.

    Args:
        concurrency: most requests under way.
        note: called after each answer.

    Returns:
        Why requests did not get an answer with status 200, for each of them.
    """
    waiting = iter(requests)
    failures: list[str] = []

    async def work(own: Iterable[BatchRequest]) -> None:
        for request in own:
            answer = await _ask(client, request)
            if failure := _failure(answer):
                failures.append(failure)
            output.write(json.dumps(answer, ensure_ascii=False) + "\n")
            output.flush()
            note()

    # every worker takes from the same iterator
    await asyncio.gather(*(work(waiting) for _ in range(min(concurrency, len(requests)))))
    return failures


def _failure(line: dict[str, Any]) -> str | None:
    """Why a line of output has no answer with status 200, if it has none."""
    if (response := line["response"]) is None:
        return line["error"]["message"]
    if response["status_code"] == 200:
        return None
    return f"{response['status_code']}: {refusal(json.dumps(response['body']))}"


async def _ask(client: httpx2.AsyncClient, request: BatchRequest) -> dict[str, Any]:
    """The line of output for a request."""
    line: dict[str, Any] = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": request.custom_id,
        "response": None,
        "error": None,
    }
    delay = RETRY_SECONDS
    for attempt in range(TRIES):
        last = attempt == TRIES - 1
        try:
            response = await client.post(request.url, json=request.body)
        except httpx2.TransportError as error:
            if last:
                line["error"] = {"code": "connection_error", "message": _lost(client, error)}
                return line
        else:
            if last or response.status_code not in NO_ROOM:
                line["response"] = {
                    "status_code": response.status_code,
                    "request_id": response.headers.get("x-request-id", ""),
                    "body": _body(response),
                }
                return line
            with suppress(KeyError, ValueError):
                delay = max(delay, float(response.headers["retry-after"]))
        await asyncio.sleep(delay)
        delay *= 2
    raise AssertionError("the last try returns")


def _lost(client: httpx2.AsyncClient, error: httpx2.TransportError) -> str:
    if isinstance(error, httpx2.ConnectError):
        return unreachable(str(client.base_url), error)
    return f"{client.base_url}: {str(error) or type(error).__name__}"


def _body(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {"error": {"message": response.text[:1000], "type": "server_error"}}
