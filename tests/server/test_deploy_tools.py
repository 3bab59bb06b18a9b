"""The files of deploy/ as the programs that read them see them; those programs that are there."""

import itertools
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from running import Running, running

from jaxllm.server.page import page_files

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
STEP_SECONDS = 0.02


def tool(name: str) -> str:
    """A program's path; skips the test where there is none."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def run(*words: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, input=text, capture_output=True, text=True, timeout=60)


def test_prometheus_reads_its_configuration() -> None:
    checked = run(tool("promtool"), "check", "config", DEPLOY / "prometheus.yml")
    assert checked.returncode == 0, checked.stderr


def test_prometheus_reads_the_metrics(server: Running) -> None:
    server.post("/v1/completions", prompt="abc", max_tokens=3)
    checked = run(tool("promtool"), "check", "metrics", text=server.http.get("/metrics").text)
    assert "error" not in checked.stderr.lower()
    # both are vLLM's ways: colons in all names, and a histogram called iteration_tokens_total
    others = ("metric names should not contain ':'", "iteration_tokens_total non-counter metrics")
    assert [line for line in checked.stderr.splitlines() if not any(o in line for o in others)] == []


def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "jaxllm.service").read_text().replace("/opt/jaxllm/bin/jaxllm", sys.executable)
    (tmp_path / "jaxllm.service").write_text(unit)
    checked = run(tool("systemd-analyze"), "verify", tmp_path / "jaxllm.service")
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.fixture
def proxied(model: Path, tmp_path: Path) -> Iterator[tuple[httpx2.Client, Running]]:
    """A client of nginx with our configuration, and the server behind it."""
    nginx, openssl = tool("nginx"), tool("openssl")
    name = ("-subj", "/CN=llm.example.org", "-addext", "subjectAltName=DNS:llm.example.org")
    pair = ("-keyout", tmp_path / "llm.key", "-out", tmp_path / "llm.pem")
    run(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *name, *pair)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = (DEPLOY / "nginx.conf").read_text()
    for there, here in (
        ("/run/jaxllm/server.sock", tmp_path / "server.sock"),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/etc/ssl", tmp_path),
    ):
        assert there in ours
        ours = ours.replace(there, str(here))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr; worker_processes 1; user root;"
        f"events {{}} http {{ access_log off; {folders} {ours} }}"
    )
    options = {"uds": str(tmp_path / "server.sock"), "root_path": "/llm", "api_key": ["k"]}
    with running(model, **options) as server:
        process = subprocess.Popen([nginx, "-c", tmp_path / "nginx.conf"], stderr=subprocess.PIPE, text=True)
        trust = ssl.create_default_context(cafile=str(tmp_path / "llm.pem"))
        trust.check_hostname = False  # the name leads to another address
        headers = {"authorization": "Bearer k"}
        url = f"https://127.0.0.1:{port}/llm"
        try:
            with httpx2.Client(base_url=url, verify=trust, headers=headers, timeout=20) as client:
                wait(client, process)
                yield client, server
        finally:
            process.terminate()
            assert process.stderr is not None
            process.stderr.close()
            process.wait()


def wait(client: httpx2.Client, process: subprocess.Popen[str]) -> None:
    """Waits until nginx answers."""
    end = time.monotonic() + 10
    while True:
        try:
            assert client.get("/health").is_success
            return
        except httpx2.ConnectError:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)


def slow_down(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has each step take `STEP_SECONDS` longer."""
    engine = server.service.loaded_engine
    assert engine is not None
    step = engine._engine.step

    def slow_step():
        time.sleep(STEP_SECONDS)
        return step()

    monkeypatch.setattr(engine._engine, "step", slow_step)


def test_behind_nginx_each_token_comes_at_once(
    proxied: tuple[httpx2.Client, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = proxied
    slow_down(server, monkeypatch)
    body = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        times = [time.monotonic() for line in response.iter_lines() if line.startswith("data:")]
    assert len(times) > 30
    assert times[-1] - times[0] > 30 * STEP_SECONDS
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert sum(gap > STEP_SECONDS / 4 for gap in gaps) > len(gaps) / 2  # not a few at a time


def test_behind_nginx_a_client_that_leaves_ends_its_request(
    proxied: tuple[httpx2.Client, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = proxied
    slow_down(server, monkeypatch)
    body = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
        assert server.service.requests == 1
    end = time.monotonic() + 50 * STEP_SECONDS
    while server.service.requests and time.monotonic() < end:
        time.sleep(STEP_SECONDS)
    assert server.service.requests == 0


def test_behind_nginx_under_a_path(proxied: tuple[httpx2.Client, Running]) -> None:
    client, _ = proxied
    assert client.get("/v1/models").is_success
    page = client.get("/", headers={"authorization": ""})
    assert page.content == page_files()["/"].body
    assert client.get("/ui/page.js", headers={"authorization": ""}).is_success
    assert client.get("/ui/state", headers={"authorization": ""}).status_code == 401
    assert client.get("/ui/state").json()["status"] == "ready"
    assert client.get("/version/").headers["location"].endswith("/llm/version")
    too_long = client.post("/v1/completions", content=b"x" * (9 << 20))
    assert too_long.status_code == 413
