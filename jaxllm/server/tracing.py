"""Traces of requests, for OpenTelemetry's collectors; needs the extra `otel`.

Names are those of the semantic conventions, https://opentelemetry.io/docs/specs/semconv/gen-ai/, and for what
they do not name vLLM's: https://docs.vllm.ai/en/stable/examples/online_serving/opentelemetry/
"""

import logging
import threading
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self

from fastapi import Request

from jaxllm.engine.metrics import RequestMetrics
from jaxllm.engine.outputs import RequestOutput
from jaxllm.sampling import SamplingParams
from jaxllm.wording import how_to_install

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
"""How long the end of the server waits for the last spans to be sent."""
SPAN_NAME = "llm_request"
OPERATIONS = {"/v1/completions": "text_completion"}
"""What requests of a path do; the others chat."""


class RequestSpan:
    """One request, from its arrival until it is answered or given up."""

    def __init__(self, span: "Span") -> None:
        self._span = span
        self._metrics: dict[str, RequestMetrics] = {}
        self._reasons: dict[tuple[str, int], str] = {}

    def see(self, output: RequestOutput) -> None:
        """Notes how far the request is."""
        if output.metrics is not None:
            self._metrics[output.request_id] = output.metrics
        for sample in output.outputs:
            if sample.finish_reason is not None:
                self._reasons[output.request_id, sample.index] = sample.finish_reason

    def fail(self, error: BaseException) -> None:
        """Notes that it was not answered, and why."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", type(error).__name__)
        self._span.set_status(Status(StatusCode.ERROR, str(error)))

    def end(self, prompt_tokens: int, completion_tokens: int) -> None:
        """The request is over."""
        found: dict[str, Any] = {
            "gen_ai.usage.input_tokens": prompt_tokens,
            "gen_ai.usage.output_tokens": completion_tokens,
            "gen_ai.usage.prompt_tokens": prompt_tokens,
            "gen_ai.usage.completion_tokens": completion_tokens,
        }
        if self._reasons:
            found["gen_ai.response.finish_reasons"] = list(self._reasons.values())
        if self._metrics:
            found |= _latencies(list(self._metrics.values()))
        self._span.set_attributes(found)
        self._span.end()


class Tracing:
    """Makes spans of requests.

    Args:
        processor: where they go.
    """

    def __init__(self, processor: "SpanProcessor") -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource({"service.name": "jaxllm"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("jaxllm", version("jaxllm"))
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> Self:
        """Sends spans to a collector in the background, as OTLP over HTTP.

        Args:
            endpoint: such as http://localhost:4318/v1/traces.

        Raises:
            ValueError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ValueError(f"otlp_traces_endpoint: {error}; {how_to_install('otel')}") from error
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint)))

    def begin(
        self, request: Request, model: str, request_id: str, params: SamplingParams, arrived: int
    ) -> RequestSpan:
        """A request's span, within the trace that its `traceparent` names: https://www.w3.org/TR/trace-context/

        Args:
            arrived: when it came, in nanoseconds since 1970.
        """
        from opentelemetry.trace import SpanKind

        attributes = {
            "gen_ai.operation.name": OPERATIONS.get(request.scope["route"].path, "chat"),
            "gen_ai.provider.name": "jaxllm",
            "gen_ai.request.id": request_id,
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.request.n": params.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
        }
        if params.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = params.max_tokens
        context = self._propagator.extract(request.headers)
        span = self._tracer.start_span(
            SPAN_NAME, context, SpanKind.SERVER, attributes=attributes, start_time=arrived
        )
        return RequestSpan(span)

    def close(self) -> None:
        """Sends what is left, for `FLUSH_SECONDS` at most.

        OpenTelemetry waits for a collector that does not answer for up to 30 s, and offers no shorter time.
        """
        last = threading.Thread(target=self._provider.shutdown, name="jaxllm-traces", daemon=True)
        last.start()
        last.join(FLUSH_SECONDS)
        if last.is_alive():
            logger.warning("the last traces are lost: the collector took none for %g s", FLUSH_SECONDS)


def _latencies(requests: list[RequestMetrics]) -> dict[str, float]:
    """Where the time went, in seconds: of a request with several prompts the longest of each."""
    spans = {
        "time_in_queue": ("arrival_time", "first_scheduled_time"),
        "time_to_first_token": ("arrival_time", "first_token_time"),
        "e2e": ("arrival_time", "finished_time"),
        "time_in_model_prefill": ("first_scheduled_time", "first_token_time"),
        "time_in_model_decode": ("first_token_time", "last_token_time"),
        "time_in_model_inference": ("first_scheduled_time", "last_token_time"),
    }
    found = {}
    for name, (begin, end) in spans.items():
        pairs = [(getattr(request, begin), getattr(request, end)) for request in requests]
        seconds = [last - first for first, last in pairs if first is not None and last is not None]
        if seconds:
            found[f"gen_ai.latency.{name}"] = max(seconds)
    return found
