"""`/metrics`: what the engine counts, under the names and types that vLLM gives them.

https://docs.vllm.ai/en/stable/design/metrics/ lists vLLM's; the prefix here is `jaxllm:`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.engine.metrics import FINISH_REASONS, Histogram, Metrics
from jaxllm.engine.replicas import FRONT
from jaxllm.server.service import Served, Service

router = APIRouter()

GAUGES = {
    "num_requests_running": ("requests_running", "Requests that hold a row of the batch."),
    "num_requests_waiting": ("requests_waiting", "Requests that wait for one."),
    "kv_cache_usage_perc": ("pages_used_ratio", "Share of the pages that requests hold, 0 to 1."),
    "engine_sleep_state": (None, "1 while the engine sleeps."),
}
COUNTERS = {
    "prefix_cache_queries": ("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_cache_hits_total", "Prompt tokens found there."),
    "num_preemptions": ("preemptions_total", "Times that a request lost its pages to another."),
    "prompt_tokens_cached": ("prompt_tokens_cached_total", "Tokens of prompts that were not computed again."),
    "prompt_tokens": ("prompt_tokens_total", "Tokens of all prompts."),
    "generation_tokens": ("generation_tokens_total", "Tokens generated."),
}
HISTOGRAMS = {
    "iteration_tokens_total": ("step_tokens", "Tokens that a step computes."),
    "time_to_first_token_seconds": ("time_to_first_token", "From arrival to the first token."),
    "inter_token_latency_seconds": ("inter_token_latency", "From a token to the next of the same output."),
    "request_time_per_output_token_seconds": ("time_per_output_token", "A request's mean time per token."),
    "e2e_request_latency_seconds": ("end_to_end_time", "From arrival to the end."),
    "request_queue_time_seconds": ("time_in_queue", "From arrival to the first step."),
    "request_inference_time_seconds": ("inference_time", "From the first step to the last token."),
    "request_prefill_time_seconds": ("prefill_time", "From the first step to the first token."),
    "request_decode_time_seconds": ("decode_time", "From the first token to the last."),
    "request_prompt_tokens": ("prompt_length", "A request's prompt tokens."),
    "request_generation_tokens": ("output_length", "A request's generated tokens."),
    "request_max_num_generation_tokens": ("longest_output", "Tokens of a request's longest output."),
    "request_prefill_kv_computed_tokens": (
        "computed_prompt",
        "A request's prompt tokens without cached ones.",
    ),
}
"""vLLM's families: the engine's name for the figure, and what it is."""

OWN_GAUGES = {
    "pages": ("num_pages", "Pages of the cache."),
    "pages_used": ("pages_used", "Pages that requests hold."),
    "programs": ("programs", "Programs, compiled or not."),
    "programs_pending": ("programs_pending", "Programs that are still to be compiled."),
    "programs_loaded": ("programs_loaded", "Programs that an earlier process had compiled."),
    "compile_seconds": ("compile_seconds", "Seconds that compiling ahead took."),
    "replica_up": ("replica_up", "1 while the replica serves, 0 from its failure until it has started over."),
    "replica_given_up": ("replica_given_up", "1 once the replica, one of several, starts over no more."),
    "expert_imbalance": ("expert_imbalance", "Tokens of the fullest device by the mean one's, enable_eplb."),
    "expert_imbalance_before": ("expert_imbalance_before", "The same before experts were placed last."),
}
OWN_COUNTERS = {
    "programs_compiled_late": ("programs_compiled_late_total", "Programs compiled while serving."),
    "steps": ("steps_total", "Steps run."),
    "engine_restarts": ("engine_restarts_total", "Times that the replica has started over after a failure."),
    "expert_rebalances": ("expert_rebalances_total", "Times that experts were placed anew, enable_eplb."),
    "scheduled_tokens": ("scheduled_tokens_total", "Tokens that steps computed, recomputed ones included."),
}
"""Families that vLLM does not have."""
LABELLED = {
    "bucket_steps": "Steps by the tokens that their programs are made for.",
    "expert_tokens": "Tokens that went to each expert, of the layers that have any.",
    "attention_backend_info": "1 for the attention kernel that runs; why others do not.",
    "matmul_backend_info": "What multiplies with weights.",
}
"""Families whose figures the engine gives with labels."""
_FIGURE = re.compile(r"(\w+)\{(.*)\}", re.DOTALL)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class EngineCollector(Collector):
    """Reads the engine's figures whenever Prometheus asks."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._prefixes = ("jaxllm", "vllm") if service.config.access.vllm_metrics else ("jaxllm",)

    def collect(self) -> Iterator[Metric]:
        """The families; those of the server alone while the engine is loading."""
        for prefix in self._prefixes:
            labels = {"model_name": self._service.names[0], "engine": "0"}
            yield from self._of_server(prefix, labels)
            if (engine := self._service.loaded_engine) is not None:
                yield from self._of_engine(prefix, labels, engine)

    def _of_engine(self, prefix: str, labels: dict[str, str], engine: AsyncEngine) -> Iterator[Metric]:
        """Families with a sample for each replica, and, where it has something to say, for their queue."""
        figures = engine.get_replica_metrics()
        metrics = {str(number): own for number, own in enumerate(engine.replica_metrics)}
        families: dict[str, Metric] = {}
        for number, own in figures.items():
            of = labels | {"engine": number}
            if number == FRONT:
                found = _of_queue(prefix, of, own)
            else:
                found = self._of_replica(prefix, of, own, metrics[number])
            for family in found:
                if family.name in families:
                    families[family.name].samples += family.samples
                else:
                    families[family.name] = family
        yield from families.values()
        yield self._cache_config(prefix)

    def _of_server(self, prefix: str, labels: Mapping[str, str]) -> Iterator[Metric]:
        service = self._service
        text = "Outputs being made or waiting."
        yield _gauge(f"{prefix}:server_active_outputs", text, labels, service.active)
        for name, histogram in service.asked.items():
            yield _histogram(f"{prefix}:request_params_{name}", "As requests gave it.", labels, histogram)

    def _of_replica(
        self, prefix: str, labels: Mapping[str, str], figures: Mapping[str, float], metrics: Metrics
    ) -> Iterator[Metric]:
        for name, (source, text) in (GAUGES | OWN_GAUGES).items():
            value = float(self._service.status == "sleeping") if source is None else figures.get(source, 0.0)
            yield _gauge(f"{prefix}:{name}", text, labels, value)
        for name, (source, text) in (COUNTERS | OWN_COUNTERS).items():
            yield _counter(f"{prefix}:{name}", text, labels, figures.get(source, 0.0))
        yield _finished(f"{prefix}:request_success", labels, figures)
        for name, (source, text) in HISTOGRAMS.items():
            yield _histogram(f"{prefix}:{name}", text, labels, getattr(metrics, source))
        yield _histogram(f"{prefix}:step_time_seconds", "Of a step, on the host.", labels, metrics.step_time)
        for part, histogram in metrics.step_parts.items():
            text = "The device idle between steps." if part == "gap" else f"Of a step: {part}."
            yield _histogram(f"{prefix}:step_{part}_seconds", text, labels, histogram)
        yield from _labelled(prefix, labels, figures)

    def _cache_config(self, prefix: str) -> Metric:
        cache = self._service.engine_config.cache
        labels = {
            "block_size": str(cache.page_size),
            "enable_prefix_caching": str(cache.enable_prefix_caching),
            "engine": "0",
        }
        return _gauge(f"{prefix}:cache_config_info", "The cache's options.", labels, 1)


def _of_queue(prefix: str, labels: Mapping[str, str], figures: Mapping[str, float]) -> Iterator[Metric]:
    """The families that count requests which no replica has, too."""
    source, text = GAUGES["num_requests_waiting"]
    yield _gauge(f"{prefix}:num_requests_waiting", text, labels, figures.get(source, 0.0))
    yield _finished(f"{prefix}:request_success", labels, figures)


def _labelled(prefix: str, labels: Mapping[str, str], figures: Mapping[str, float]) -> Iterator[Metric]:
    """The families of figures that have labels of their own; without samples where there are no figures."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {name: [] for name in LABELLED}
    for figure, value in figures.items():
        if match := _FIGURE.fullmatch(figure):
            own = {name: _unescape(text) for name, text in _LABEL.findall(match[2])}
            found.setdefault(match[1].removesuffix("_total"), []).append((own, value))
    for name, samples in found.items():
        names = list(dict.fromkeys(label for own, _ in samples for label in own))
        kind = GaugeMetricFamily if name.endswith("_info") else CounterMetricFamily
        family = kind(
            f"{prefix}:{name}", LABELLED.get(name, "As the engine gives it."), labels=[*labels, *names]
        )
        for own, value in samples:
            family.add_metric([*labels.values(), *(own.get(label, "") for label in names)], value)
        yield family


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


def _gauge(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    family = CounterMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _finished(name: str, labels: Mapping[str, str], figures: Mapping[str, float]) -> Metric:
    text = "Requests by how they ended."
    family = CounterMetricFamily(name, text, labels=[*labels, "finished_reason"])
    for reason in FINISH_REASONS:
        family.add_metric([*labels.values(), reason], figures[f"requests_finished_{reason}_total"])
    return family


def _histogram(name: str, text: str, labels: Mapping[str, str], histogram: Histogram) -> Metric:
    buckets: list[Any] = []
    total = 0
    for bound, count in zip([*map(str, histogram.bounds), "+Inf"], list(histogram.counts), strict=True):
        total += count
        buckets.append((bound, total))
    family = HistogramMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), buckets, sum_value=histogram.sum)
    return family


@router.get("/metrics", response_class=Response)
def metrics(service: Served) -> Response:
    """Figures for Prometheus."""
    return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)
