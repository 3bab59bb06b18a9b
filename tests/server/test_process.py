"""The server as a process: how it starts, what it prints, and how it ends."""

import asyncio
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from running import ENGINE

from jaxllm.cli.flags import flag_name
from jaxllm.config import EngineConfig
from jaxllm.server.config import ServerConfig
from jaxllm.server.run import make_server

FLAGS = [
    word
    for name, value in ENGINE.items()
    for word in (
        [flag_name(name), str(value)] if not isinstance(value, bool) else [f"--no-{flag_name(name)[2:]}"]
    )
]


@contextmanager
def process(*argv: str, **environment: str) -> Iterator[subprocess.Popen]:
    """The server, with its log as its stderr; killed if it is still there at the end."""
    found = subprocess.Popen(
        [sys.executable, "-m", "jaxllm.entrypoints.openai.api_server", *argv],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        yield found
    finally:
        found.kill()
        found.wait()
        assert found.stderr is not None
        found.stderr.close()


def lines(server: subprocess.Popen, until: str) -> str:
    """The log up to a line with this text."""
    read = []
    assert server.stderr is not None
    for line in server.stderr:
        read.append(line)
        if until in line:
            return line
    raise AssertionError("".join(read))


def address(server: subprocess.Popen) -> str:
    line = json.loads(lines(server, "running on"))["message"]
    return next(word for word in line.split() if word.startswith("http://"))


def test_a_server_from_a_file_of_flags_drains_when_it_is_told_to_end(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(
        "port: 0\nserved-model-name: [tiny]\nlog-format: json\nshutdown_timeout: 20\nhost: 127.0.0.9\n"
    )
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfrom-file\n")
    argv = [
        "--config",
        str(config),
        "--model",
        str(model),
        "--host",
        "127.0.0.1",
        "--api-key-file",
        str(keys),
    ]
    with process(*argv, "--api-key", "first", "second", *FLAGS, JAXLLM_API_KEY="from-environment") as server:
        url = address(server)
        assert httpx2.get(f"{url}/health").is_success
        lines(server, "ready: tiny")
        body = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True, "stream": True, "user": "somebody"}
        assert httpx2.post(f"{url}/v1/completions", json=body).status_code == 401
        for key in ("first", "second", "from-file", "from-environment"):
            bearer = {"authorization": f"Bearer {key}"}
            assert httpx2.get(f"{url}/v1/models", headers=bearer).is_success
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, headers=bearer) as response:
            texts = response.iter_lines()
            next(texts)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in texts if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        logged = json.loads(lines(server, '"completion_tokens": 100'))
        assert (logged["status"], logged["user"]) == (200, "somebody")
        assert server.wait(20) == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_while_the_model_is_loaded(model: Path, signals: int) -> None:
    with process("--model", str(model), "--port", "0", "--log-format", "json", *FLAGS) as server:
        address(server)
        begin = time.monotonic()
        for _ in range(signals):
            server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        assert time.monotonic() - begin < 5


def test_a_second_signal_ends_at_once(model: Path) -> None:
    with process("--model", str(model), "--port", "0", "--log-format", "json", *FLAGS) as server:
        url = address(server)
        lines(server, "ready")
        body = {"prompt": ["abc"] * 50, "n": 2, "max_tokens": 120, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            next(response.iter_lines())
            server.send_signal(signal.SIGINT)
            lines(server, "stopping")
            server.send_signal(signal.SIGTERM)
            assert server.wait(5) == 0


def test_other_packages_lines_have_the_logs_form() -> None:
    code = """
import logging
from jaxllm.server import logs
from jaxllm.server.config import LogConfig
logs.configure(LogConfig(log_level="debug", log_format="json"))
logging.getLogger("opentelemetry.exporter").error("Failed to export spans batch")
logging.getLogger("opentelemetry.exporter").debug("not ours")
logging.getLogger("jaxllm.server").debug("ours")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in found.stderr.splitlines()]
    assert [(line["logger"], line["level"], line["message"]) for line in said] == [
        ("opentelemetry.exporter", "error", "Failed to export spans batch"),
        ("jaxllm.server", "debug", "ours"),
    ]


def test_a_signal_that_meets_a_line_of_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(io.RawIOBase):
        """What a line is written to; a signal comes meanwhile."""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            if not server.should_exit:
                signal.raise_signal(signal.SIGTERM)
            return len(data)

    async def log() -> None:
        with server.capture_signals():
            logger.info("a line")
            await asyncio.sleep(0.1)

    server, service = make_server(ServerConfig(), EngineConfig.create("m"))
    before = signal.getsignal(signal.SIGTERM)
    logger = logging.getLogger("jaxllm")
    caplog.set_level(logging.INFO, "jaxllm")
    stream = io.TextIOWrapper(io.BufferedWriter(Interrupted()), line_buffering=True)
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        asyncio.run(log())
    finally:
        logger.removeHandler(handler)
    assert server.should_exit
    assert service.draining
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_port_that_is_taken(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with process("--model", str(model), "--port", port, *FLAGS) as server:
            lines(server, "address already in use")
            assert server.wait(20) == 1


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with process("--model", str(tmp_path), "--port", "0") as server:
        assert server.wait(30) == 1
        assert server.stderr is not None
        said = server.stderr.read().splitlines()
    assert re.search(f"ERROR stopped: the model cannot be loaded: .*{re.escape(str(tmp_path))}", said[-1])
    assert sum("cannot be loaded" in line for line in said) == 2  # when it was known, and at the end
