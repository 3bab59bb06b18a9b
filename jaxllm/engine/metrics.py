"""What the engine counts and times: per request, and all together.

Times are seconds of one monotonic clock, which the tests replace.
"""

import bisect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Array, Int, Int64

from jaxllm.engine.step_clock import PARTS, StepTimes
from pallas_kernels.registry import Choice

# Seconds, three to a decade from a tenth of a millisecond to a quarter of an hour.
_TIME_BOUNDS = tuple(base * 10.0**power for power in range(-4, 3) for base in (1.0, 2.0, 5.0))
_TOKEN_BOUNDS = tuple(base * 10.0**power for power in range(6) for base in (1.0, 2.0, 5.0))
_STEP_TOKEN_BOUNDS = (1.0, *(2.0**power for power in range(3, 15)))
_COUNTED = (
    "requests",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "preemptions",
    "steps",
    "scheduled_tokens",
    "engine_restarts",
)
FINISH_REASONS: tuple[str, ...] = ("stop", "length", "abort", "error")


@dataclass
class RequestMetrics:
    """When things happened to one request, in seconds of the engine's clock; None until they happen."""

    arrival_time: float
    num_prompt_tokens: int
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0
    """Tokens generated, all of the request's outputs together."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    num_preemptions: int = 0
    _last_token_times: dict[int, float] = field(default_factory=dict, repr=False)
    _output_lengths: dict[int, int] = field(default_factory=dict, repr=False)

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first step."""
        return _between(self.arrival_time, self.first_scheduled_time)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return _between(self.arrival_time, self.first_token_time)

    @property
    def end_to_end_time(self) -> float | None:
        """Seconds from arrival to the end."""
        return _between(self.arrival_time, self.finished_time)


class Histogram:
    """Counts of values in fixed buckets, with their sum: constant memory, however many values.

    Args:
        bounds: upper ends of the buckets, rising; a last bucket without an end is added.
    """

    def __init__(self, bounds: Sequence[float] = _TIME_BOUNDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0
        self._least, self._most = math.inf, -math.inf

    @property
    def count(self) -> int:
        """Values seen."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Mean of the values; 0 if there are none."""
        return self.sum / self.count if self.count else 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Adds a value, `times` times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times
        if value < self._least:
            self._least = value
        if value > self._most:
            self._most = value

    def add(self, other: "Histogram") -> None:
        """Adds what another one of the same buckets has seen."""
        self.counts = [own + others for own, others in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum
        self._least, self._most = min(self._least, other._least), max(self._most, other._most)

    def quantile(self, share: float) -> float:
        """The value that `share` of the values do not exceed, linear in its bucket; 0 if there are none."""
        wanted, seen = share * self.count, 0
        for i, count in enumerate(self.counts):
            if count and seen + count >= wanted:
                low = max(self._least, self.bounds[i - 1] if i else self._least)
                high = min(self._most, self.bounds[i] if i < len(self.bounds) else self._most)
                return low + (high - low) * (wanted - seen) / count
            seen += count
        return 0.0


@dataclass(frozen=True)
class EngineState:
    """How things stand at a moment."""

    requests_running: int
    """Requests that hold a row."""
    requests_waiting: int
    pages_used: int
    """Pages that requests hold; cached pages that nobody holds are free."""
    num_pages: int
    prefix_cache_queries: int
    """Prompt tokens looked up in the prefix cache, ever."""
    prefix_cache_hits: int
    """Prompt tokens found there, ever."""


class Metrics:
    """Everything the engine counts. One thread writes; a snapshot may be taken from any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._finished = dict.fromkeys(FINISH_REASONS, 0)
        self._totals = dict.fromkeys(_COUNTED, 0)
        self.time_in_queue = Histogram()
        self.time_to_first_token = Histogram()
        self.inter_token_latency = Histogram()
        self.end_to_end_time = Histogram()
        self.prefill_time = Histogram()
        self.decode_time = Histogram()
        self.inference_time = Histogram()
        self.time_per_output_token = Histogram()
        self.prompt_length = Histogram(_TOKEN_BOUNDS)
        self.output_length = Histogram(_TOKEN_BOUNDS)
        self.longest_output = Histogram(_TOKEN_BOUNDS)
        self.computed_prompt = Histogram(_TOKEN_BOUNDS)
        self.step_tokens = Histogram(_STEP_TOKEN_BOUNDS)
        self.step_time = Histogram()
        self.step_parts = {part: Histogram() for part in PARTS}
        self.expert_tokens: Int64[np.ndarray, "layers experts"] | None = None
        """Tokens that went to each expert, of the layers that have any; None while none were counted."""

    def request_arrived(self, num_prompt_tokens: int, *, arrival_time: float | None = None) -> RequestMetrics:
        """Counts a request and starts its own record.

        Args:
            num_prompt_tokens: tokens of its prompt.
            arrival_time: when it arrived, on the engine's clock, if that was not now.
        """
        request = RequestMetrics(self._clock() if arrival_time is None else arrival_time, num_prompt_tokens)
        self.request_taken(request)
        return request

    def request_taken(self, request: RequestMetrics) -> None:
        """Counts a request that has arrived somewhere else, where its record was started."""
        self._totals["requests"] += 1
        self._totals["prompt_tokens"] += request.num_prompt_tokens

    def request_scheduled(self, request: RequestMetrics, *, num_cached_tokens: int = 0) -> None:
        """A step runs the request; only its first counts."""
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            request.num_cached_tokens = num_cached_tokens
            self._totals["prompt_tokens_cached"] += num_cached_tokens
            self.time_in_queue.observe(request.first_scheduled_time - request.arrival_time)

    def request_preempted(self, request: RequestMetrics) -> None:
        """The request lost its pages, and will be computed again."""
        request.num_preemptions += 1
        self._totals["preemptions"] += 1

    def tokens_generated(self, request: RequestMetrics, count: int, *, index: int = 0) -> None:
        """Tokens of one of the request's outputs have reached the host.

        Several that come at once share the time since the output's last token equally.
        """
        if count < 1:
            return
        now = self._clock()
        if request.first_token_time is None:
            request.first_token_time = now
            self.time_to_first_token.observe(now - request.arrival_time)
        last = request._last_token_times.get(index)
        if last is not None:
            self.inter_token_latency.observe((now - last) / count, count)
        request._last_token_times[index] = request.last_token_time = now
        request._output_lengths[index] = request._output_lengths.get(index, 0) + count
        request.num_generation_tokens += count
        self._totals["generation_tokens"] += count

    def request_finished(self, request: RequestMetrics, reason: str) -> None:
        """All of the request's outputs have ended.

        Args:
            request: its record.
            reason: "stop", "length", "abort" or "error".
        """
        request.finished_time = self._clock()
        self._finished[reason] += 1
        self.end_to_end_time.observe(request.finished_time - request.arrival_time)
        self.prompt_length.observe(request.num_prompt_tokens)
        self.output_length.observe(request.num_generation_tokens)
        self.longest_output.observe(max(request._output_lengths.values(), default=0))
        start, first, last = request.first_scheduled_time, request.first_token_time, request.last_token_time
        if start is not None and first is not None and last is not None:
            self.computed_prompt.observe(request.num_prompt_tokens - request.num_cached_tokens)
            self.prefill_time.observe(first - start)
            self.decode_time.observe(last - first)
            self.inference_time.observe(last - start)
            if request.num_generation_tokens > 1:
                self.time_per_output_token.observe((last - first) / (request.num_generation_tokens - 1))

    def engine_restarted(self) -> None:
        """The engine has started over after a failure."""
        self._totals["engine_restarts"] += 1

    def step_done(self, times: StepTimes) -> None:
        """Counts a turn of the step loop; one that dispatched nothing only adds to the parts."""
        for part, histogram in self.step_parts.items():
            histogram.observe(getattr(times, part))
        if times.num_rows:
            self.step_time.observe(times.total)
            self.step_tokens.observe(times.num_tokens)
            self._totals["steps"] += 1
            self._totals["scheduled_tokens"] += times.num_tokens

    def experts_used(self, tokens: Sequence[Int[Array | np.ndarray, "layers experts"]]) -> None:
        """Counts how many tokens of a step went to each expert, in each stage that counts them."""
        if tokens:
            self._add_expert_tokens(np.concatenate(tokens).astype(np.int64))

    def _add_expert_tokens(self, new: Int64[np.ndarray, "layers experts"]) -> None:
        self.expert_tokens = new if self.expert_tokens is None else self.expert_tokens + new

    @classmethod
    def together(cls, parts: Sequence["Metrics"]) -> "Metrics":
        """What several have counted, as one that nobody writes to."""
        found = cls(parts[0]._clock)
        found._start = min(part._start for part in parts)
        for part in parts:
            for name, value in part._totals.items():
                found._totals[name] += value
            for reason, count in part._finished.items():
                found._finished[reason] += count
            for name, histogram in vars(part).items():
                if isinstance(histogram, Histogram):
                    getattr(found, name).add(histogram)
            for name, histogram in part.step_parts.items():
                found.step_parts[name].add(histogram)
            if part.expert_tokens is not None:
                found._add_expert_tokens(part.expert_tokens)
        return found

    def snapshot(self, state: EngineState) -> dict[str, float]:
        """Everything counted, as one flat dict.

        Names ending in `_total` only ever grow; `_seconds` are seconds; `_ratio` is from 0 to 1; other
        names are how things stand now, as `state` says.

        - `uptime_seconds`: since the engine started.
        - `requests_total`, `requests_finished_{stop,length,abort,error}_total`.
        - `requests_running`, `requests_waiting`.
        - `prompt_tokens_total`, `prompt_tokens_cached_total`, `generation_tokens_total`.
        - `scheduled_tokens_total`: tokens that steps computed, again after preemption included, prefix hits
          not.
        - `preemptions_total`, `steps_total`, `engine_restarts_total`.
        - `pages_used`, `num_pages`, `pages_used_ratio`.
        - `prefix_cache_queries_total`, `prefix_cache_hits_total` (tokens), `prefix_cache_hit_ratio`.
        - `{name}_seconds_{mean,p50,p90,p99}` and `{name}_count` for each name of `time_in_queue`,
          `time_to_first_token`, `inter_token_latency`, `end_to_end_time`, `step_time`, and of
          `step_{schedule,pack,dispatch,wait,process,device,gap}`: the parts of a step, see `StepTimes`.
        - `expert_tokens_total{layer="0",expert="0"}` and so on, where experts are counted (`expert_metrics`):
          layers are numbered as they come, without those that have no experts.
        """
        counts = {f"{name}_total": float(value) for name, value in self._totals.items()}
        counts |= {f"requests_finished_{reason}_total": float(n) for reason, n in self._finished.items()}
        counts |= {
            "uptime_seconds": self._clock() - self._start,
            "requests_running": float(state.requests_running),
            "requests_waiting": float(state.requests_waiting),
            "pages_used": float(state.pages_used),
            "num_pages": float(state.num_pages),
            "pages_used_ratio": _ratio(state.pages_used, state.num_pages),
            "prefix_cache_queries_total": float(state.prefix_cache_queries),
            "prefix_cache_hits_total": float(state.prefix_cache_hits),
            "prefix_cache_hit_ratio": _ratio(state.prefix_cache_hits, state.prefix_cache_queries),
        }
        for name in (
            "time_in_queue",
            "time_to_first_token",
            "inter_token_latency",
            "end_to_end_time",
            "step_time",
        ):
            counts |= _summary(name, getattr(self, name))
        for part, histogram in self.step_parts.items():
            counts |= _summary(f"step_{part}", histogram)
        return counts | {
            f"expert_tokens_total{metric_labels(layer=str(layer), expert=str(expert))}": float(tokens)
            for layer, experts in enumerate(() if self.expert_tokens is None else self.expert_tokens)
            for expert, tokens in enumerate(experts)
        }


def choice_metrics(name: str, choice: Choice[Any]) -> dict[str, float]:
    """A choice among kernels as Prometheus shows texts: in the labels of a metric.

    https://prometheus.io/docs/instrumenting/exposition_formats/#text-format-details
    """
    others = {f"{name}{metric_labels(backend=other, reason=why)}": 0.0 for other, why in choice.passed_over}
    return {f"{name}{metric_labels(backend=choice.backend.name)}": 1.0} | others


def metric_labels(**labels: str) -> str:
    """Labels as Prometheus writes them after a metric's name; those that are empty are left out."""
    escaped = {
        name: value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        for name, value in labels.items()
        if value
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"


def _between(start: float, end: float | None) -> float | None:
    return None if end is None else end - start


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _summary(name: str, histogram: Histogram) -> dict[str, float]:
    quantiles = {
        f"{name}_seconds_p{round(share * 100)}": histogram.quantile(share) for share in (0.5, 0.9, 0.99)
    }
    return {f"{name}_seconds_mean": histogram.mean, f"{name}_count": float(histogram.count)} | quantiles
