"""Clients that leave, hang, flood or fail: nobody else notices, and nothing is left behind."""

import asyncio
import dataclasses
import gc
import json
import socket
import time
from collections.abc import Awaitable

import openai
import pytest
from running import Running
from starlette.types import Message, Send

from jaxllm.server.run import leave_to_themselves

LONG = {"prompt": "abc", "max_tokens": 120, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def clean(server: Running):
    """The server; afterwards nothing runs, and no more pages are used than before."""
    server.wait_idle()
    before = server.figures()["pages_used"]
    yield server
    server.wait_idle()
    assert server.figures()["pages_used"] == before
    assert server.service.requests == server.service.active == 0
    assert server.post("/v1/completions", prompt="still there", max_tokens=2).is_success


def raw(server: Running, body: dict) -> socket.socket:
    """Sends a request over a bare socket."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_ends_the_request(clean: Running, stream: bool) -> None:
    aborted = clean.figures()["requests_finished_abort_total"]
    connection = raw(clean, {**LONG, "n": 16, "temperature": 1, "stream": stream})
    while not clean.figures()["requests_running"]:
        time.sleep(0.001)
    connection.close()
    clean.wait_idle()
    assert clean.figures()["requests_finished_abort_total"] == aborted + 1


def test_a_full_queue_is_said(clean: Running) -> None:
    connections = [raw(clean, {**LONG, "n": 16, "temperature": 1, "stream": True}) for _ in range(4)]
    while clean.service.active < 64:
        time.sleep(0.001)
    refused = clean.post("/v1/completions", prompt="a")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    with pytest.raises(openai.InternalServerError, match="waiting"):
        clean.openai.completions.create(model="tiny", prompt="a")
    assert clean.http.get("/health").is_success
    for connection in connections:
        connection.close()


def test_a_deadline(clean: Running) -> None:
    headers = {"x-request-timeout": "0.01"}
    late = clean.http.post("/v1/completions", json={**LONG, "prompt": ["a", "b"]}, headers=headers)
    assert late.status_code == 408
    assert late.json()["error"]["code"] == "timeout"
    streamed = clean.http.post("/v1/completions", json={**LONG, "stream": True}, headers=headers).text
    *_, error, done = streamed.removesuffix("\n\n").split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
    assert done == "data: [DONE]"
    for value in ("0", "-1", "nan", "soon"):
        response = clean.http.post("/v1/completions", json=LONG, headers={"x-request-timeout": value})
        assert response.status_code == 400


def unread(server: Running, send: Send, *headers: tuple[bytes, bytes]) -> Awaitable[None]:
    """Asks for a stream without a socket: the client stays, and reads what `send` takes."""
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
        "query_string": b"", "root_path": "", "headers": [(b"content-type", b"application/json"), *headers],
    }  # fmt: skip
    asked = asyncio.Event()

    async def receive() -> Message:
        if asked.is_set():
            await asyncio.Event().wait()
        asked.set()
        return {"type": "http.request", "body": json.dumps({**LONG, "stream": True}).encode()}

    return server.app(scope, receive, send)


def test_a_reader_that_stops_reading_holds_nobody_up(clean: Running) -> None:
    expected = clean.post("/v1/completions", **LONG).json()["choices"][0]["text"]
    sent: list[bytes] = []

    async def main() -> None:
        reads = asyncio.Event()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                sent.append(message["body"])
                await reads.wait()

        task = asyncio.ensure_future(unread(clean, send))
        while not sent:
            await asyncio.sleep(0.001)
        other = await asyncio.to_thread(clean.post, "/v1/completions", **LONG)
        assert other.json()["choices"][0]["text"] == expected
        async with asyncio.timeout(20):  # it finishes, though nobody reads it
            while clean.figures()["requests_running"]:
                await asyncio.sleep(0.01)
        reads.set()
        await task

    asyncio.run(main())
    events = b"".join(sent).decode().removesuffix("\n\n").split("\n\n")[:-1]
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == expected
    assert len(sent) <= 4  # all that came meanwhile is one event


def test_a_reader_that_never_reads_is_given_up(clean: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxllm.server.event_stream.LINGER_SECONDS", 0.05)

    async def main() -> None:
        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        async with asyncio.timeout(10):
            await unread(clean, send, (b"x-request-timeout", b"0.1"))

    asyncio.run(main())


def test_a_silent_stream_gets_comments(clean: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    config = clean.service.config
    limits = dataclasses.replace(config.limits, sse_keep_alive=0.001)
    monkeypatch.setattr(clean.service, "config", dataclasses.replace(config, limits=limits))
    busy = [raw(clean, {**LONG, "n": 16, "temperature": 1}) for _ in range(2)]
    text = clean.post("/v1/completions", **LONG, stream=True).text
    assert ": keep-alive\n\n" in text
    parts = [
        json.loads(line[6:])["choices"][0]["text"] for line in text.splitlines() if line[:7] == "data: {"
    ]
    assert "".join(parts) == clean.post("/v1/completions", **LONG).json()["choices"][0]["text"]
    for connection in busy:
        connection.close()


def test_a_failed_step_fails_its_requests_and_no_others(
    clean: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = clean.service.engine
    runner = engine._engine._core.runner
    dispatch, calls = runner.dispatch, iter(range(10**6))

    def fail_once(*args, **options):
        if next(calls) == 3:
            raise RuntimeError("secret detail")
        return dispatch(*args, **options)

    monkeypatch.setattr(runner, "dispatch", fail_once)
    failed = clean.post("/v1/completions", **LONG)
    assert failed.status_code == 500
    assert failed.json()["error"]["type"] == "server_error"
    assert "secret" not in failed.text
    assert clean.http.get("/health").is_success
    assert clean.post("/v1/completions", **LONG).is_success


def test_a_tokenizer_that_breaks_fails_the_request_alone(
    clean: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = clean.service.engine._engine._inputs
    encode = inputs._encode

    def broken(text, **options):
        if "poison" in text:
            raise RuntimeError("secret detail")
        return encode(text, **options)

    monkeypatch.setattr(inputs, "_encode", broken)
    for path, body in (
        ("/v1/completions", {"prompt": ["fine", "poison"]}),
        ("/v1/completions", {"prompt": "poison", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "poison"}]}),
    ):
        failed = clean.post(path, **body)
        assert failed.status_code == 500
        assert "secret" not in failed.text


def test_the_garbage_collector_is_spared_what_stays(server: Running) -> None:
    try:
        leave_to_themselves(server.service.engine)
        assert gc.get_freeze_count() > 100_000
        assert len(gc.get_objects()) < 50_000
    finally:
        gc.unfreeze()
