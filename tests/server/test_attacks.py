"""What an attacker may send: each is refused with 4xx, and requests of others go on meanwhile."""

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from running import Running, running

from jaxllm.engine import chat

LONG = {"prompt": "abc", "max_tokens": 120, "ignore_eos": True, "temperature": 0}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module", autouse=True)
def others(server: Running) -> Iterator[None]:
    """Texts of requests that are made all the time meanwhile. They have to stay the same."""
    texts, stop = [server.post("/v1/completions", **LONG).json()["choices"][0]["text"]], threading.Event()

    def ask() -> None:
        with httpx2.Client(base_url=server.url, timeout=30) as http:
            while not stop.is_set():
                answer = http.post("/v1/completions", json=LONG)
                texts.append(answer.json()["choices"][0]["text"] if answer.is_success else answer.text)

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    while len(texts) < 2:
        time.sleep(0.01)
    stop.set()
    thread.join()
    assert set(texts) == set(texts[:1])
    assert server.http.get("/health").is_success


def send(server: Running, content: bytes, path: str = "/v1/completions", **headers: str) -> httpx2.Response:
    return server.http.post(path, content=content, headers=JSON | headers)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 5000, "-1e-999999999"])
def test_numbers(server: Running, number: str) -> None:
    for field in ("temperature", "seed", "n", "max_tokens", "top_k", "priority", "logprobs"):
        content = b'{"prompt": "a", "max_tokens": 1, "%s": %s}' % (field.encode(), number.encode())
        answer = send(server, content)
        assert 400 <= answer.status_code < 500 or number == "-1e-999999999"  # which is 0
        assert answer.status_code < 500
    bias = b'{"prompt": "a", "logit_bias": {"5": %s}, "max_tokens": 1}' % number.encode()
    assert send(server, bias).status_code < 500


@pytest.mark.parametrize("token", ["-1", "125", "99999999999999999999", "1.5", "x", ""])
def test_tokens_that_there_are_not(server: Running, token: str) -> None:
    answer = server.post("/v1/completions", prompt="a", logit_bias={token: 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logit_bias")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 90_000,
        b'{"a":' * 15_000 + b"1" + b"}" * 15_000,
        b'{"prompt": "a", "response_format": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
        b'{"prompt": ' + b"[" * 5000 + b"1" + b"]" * 5000 + b"}",
        b'{"prompt": [' + b"1," * 45_000 + b"1]}",
        b'{"prompt": [' + b'"a",' * 20_000 + b'"a"]}',
        b'{"prompt": "' + b"a" * 90_000 + b'"}',
        b'{"prompt": "a", "prompt": 5}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\\ud800"}',
        b"\xef\xbb\xbf{}",
        b"\x1f\x8b\x08\x00",
        b"",
        b"prompt=a",
    ],
    ids=range(15),
)
def test_bodies(server: Running, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"):
        answer = send(server, content, path)
        assert 400 <= answer.status_code < 500, (path, answer.text[:300])
        assert len(answer.content) < 2000


def test_content_types(server: Running) -> None:
    body = json.dumps(LONG).encode()
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/xml", "", "a/b/c"):
        answer = send(server, body, **{"content-type": kind})
        assert 400 <= answer.status_code < 500, kind
    assert send(server, body, **{"content-encoding": "gzip"}).status_code in (200, 415)


def test_headers(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    many = "".join(f"x-{number}: {'y' * 100}\r\n" for number in range(900))
    for head in (
        f"GET /health HTTP/1.1\r\nhost: x\r\n{many}\r\n",
        "GET /health HTTP/1.1\r\n\r\n",
        "GET /" + "a" * 200_000 + " HTTP/1.1\r\nhost: x\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n",
        "GET /health HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        "\x16\x03\x01\x02\x00",
    ):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head.encode())
            if head.startswith("\x16"):
                connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(100)
        assert answer[9:10] in (b"4", b""), (head[:60], answer)


def test_what_a_template_is_given(server: Running) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for message in (
        {"role": "user", "content": "{{ 7 * 7 }}{% for a in range(9) %}{% endfor %}"},
        {"role": "user", "content": "x", "__class__": "y"},
    ):
        answer = server.post("/v1/chat/completions", messages=[message], max_tokens=1)
        assert answer.status_code in (200, 400)
        assert "49" not in server.post("/tokenize", messages=[message]).text
    for variables in (
        {"messages": []},
        {"add_generation_prompt": 1},
        {"tokenize": True},
        {"x": "y" * 50_000},
    ):
        answer = server.post("/v1/chat/completions", messages=messages, chat_template_kwargs=variables)
        assert answer.status_code in (200, 400)
    crowd = [{"role": "user", "content": ""}] * 2500
    assert server.post("/v1/chat/completions", messages=crowd).status_code == 400


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ range(10 ** 9) }}",
        "{% include '/etc/passwd' %}",
        "{% for",
        "{{ raise_exception('no') }}",
    ],
)
def test_templates_of_requests(server: Running, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    config = server.service.config
    access = dataclasses.replace(config.access, trust_request_chat_template=True)
    monkeypatch.setattr(server.service, "config", dataclasses.replace(config, access=access))
    monkeypatch.setattr(chat, "MOST_SECONDS", 0.3)
    messages = [{"role": "user", "content": "hi"}]
    begin = time.monotonic()
    answer = server.post("/v1/chat/completions", messages=messages, chat_template=template)
    assert answer.status_code == 400, answer.text
    assert time.monotonic() - begin < 10


PATHS = (
    "//v1/models", "/v1//models", "/./v1/models", "/health/../v1/models", "/health/%2e%2e/v1/models",
    "/health;/v1/models", "/health%00", "/HEALTH", "/v1/models#/health", "/health\\..\\metrics", "/%68ealth",
    "/health%2f..%2fmetrics", "/health/", "http://x/health@/v1/models",
)  # fmt: skip


def test_paths_past_the_keys(model: Path) -> None:
    with running(model, api_key=("k",)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for path in PATHS:
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
                assert connection.recv(100)[9:12] in (b"400", b"401", b"404"), path
