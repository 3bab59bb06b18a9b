"""Traces and profiles."""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from running import Running, server_config

from jaxllm.server import tracing
from jaxllm.server.profiling import Profiler
from jaxllm.server.tracing import Tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODY = {"prompt": "abc", "max_tokens": 5, "ignore_eos": True}


@pytest.fixture
def spans(server: Running, monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Where the server's spans go."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(server.service, "tracing", Tracing(SimpleSpanProcessor(exporter)))
    return exporter


def only(server: Running, spans: InMemorySpanExporter) -> tuple[ReadableSpan, dict[str, Any]]:
    server.wait_idle()
    [span] = spans.get_finished_spans()
    return span, dict(span.attributes or {})


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_a_span_of_its_callers_trace(
    server: Running, spans: InMemorySpanExporter, stream: bool
) -> None:
    body = BODY | {"stream": stream, "n": 2, "temperature": 0.5, "request_id": "mine"}
    assert server.http.post("/v1/completions", json=body, headers={"traceparent": PARENT}).is_success
    span, found = only(server, spans)
    assert (span.name, span.kind.name) == ("llm_request", "SERVER")
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" == PARENT[3:-3]
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.id": "mine",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.n": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.usage.prompt_tokens": 4,
        "gen_ai.usage.completion_tokens": 10,
        "gen_ai.response.finish_reasons": ("length", "length"),
    }
    assert expected.items() <= found.items()
    seconds = {name.removeprefix("gen_ai.latency."): found[name] for name in found if ".latency." in name}
    assert set(seconds) == {
        "time_in_queue", "time_to_first_token", "e2e", "time_in_model_prefill", "time_in_model_decode",
        "time_in_model_inference",
    }  # fmt: skip
    assert 0 <= seconds["time_in_queue"] <= seconds["time_to_first_token"] <= seconds["e2e"]
    assert span.start_time is not None
    assert span.end_time is not None
    assert (span.end_time - span.start_time) / 1e9 >= seconds["e2e"]
    assert span.resource.attributes["service.name"] == "jaxllm"


class Unreachable(SpanExporter):
    """A collector that takes nothing, and from which one waits for long."""

    def __init__(self) -> None:
        self.gone = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.gone.wait(30)
        return SpanExportResult.FAILURE


def test_the_end_does_not_wait_long_for_a_collector(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = Unreachable()
    traced = Tracing(BatchSpanProcessor(exporter))
    monkeypatch.setattr(server.service, "tracing", traced)
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.1)
    assert server.post("/v1/completions", **BODY).is_success
    server.wait_idle()
    begin = time.monotonic()
    traced.close()
    assert time.monotonic() - begin < 5
    assert "the last traces are lost" in caplog.text
    exporter.gone.set()


def test_what_a_request_does_is_known_under_a_proxys_path_too(
    server: Running, spans: InMemorySpanExporter
) -> None:
    async def main() -> None:
        transport = httpx2.ASGITransport(server.app, root_path="/llm")
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            assert (await client.post("/llm/v1/completions", json=BODY)).is_success

    asyncio.run(main())
    _, found = only(server, spans)
    assert found["gen_ai.operation.name"] == "text_completion"


def test_a_request_that_fails_says_so(server: Running, spans: InMemorySpanExporter) -> None:
    headers = {"x-request-timeout": "0.001"}
    body = BODY | {"prompt": ["a", "b"], "max_tokens": 100}
    assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 408
    span, found = only(server, spans)
    assert span.status.status_code is StatusCode.ERROR
    assert found["error.type"] == "ApiError"
    assert server.post("/v1/completions", prompt="a", temperature=-1).status_code == 400


def test_where_traces_go() -> None:
    with pytest.raises(ValueError, match="otlp_traces_endpoint='localhost:4317'"):
        server_config(otlp_traces_endpoint="localhost:4317")
    tracing = Tracing.to("http://127.0.0.1:9/v1/traces")
    tracing.close()


def test_profiles(server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert server.post("/start_profile").status_code == 400
    monkeypatch.setattr(server.service, "profiler", Profiler(tmp_path / "profiles"))
    assert server.post("/stop_profile").status_code == 409
    assert server.post("/start_profile").json()["folder"] == str(tmp_path / "profiles")
    assert server.post("/start_profile").status_code == 409
    assert server.post("/v1/completions", **BODY).is_success
    assert server.post("/stop_profile").is_success
    assert list((tmp_path / "profiles").rglob("*.xplane.pb"))


def test_profiles_are_for_administrators() -> None:
    from test_status import not_loaded

    async def main() -> None:
        client, _ = not_loaded()
        async with client:
            response: httpx2.Response = await client.post("/start_profile")
            assert response.status_code == 404

    asyncio.run(main())
