"""Counts and times of a small history, against a clock that the test turns."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.engine.metrics import EngineState, Histogram, Metrics
from jaxllm.engine.step_clock import StepClock, StepTimes

IDLE = EngineState(0, 0, 0, 0, 0, 0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_request_from_arrival_to_end() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    request = metrics.request_arrived(7)
    assert (request.time_in_queue, request.time_to_first_token, request.end_to_end_time) == (None, None, None)
    clock.now += 1
    metrics.request_scheduled(request, num_cached_tokens=4)
    clock.now += 2
    metrics.tokens_generated(request, 1)
    clock.now += 3
    metrics.tokens_generated(request, 3)
    clock.now += 4
    metrics.request_preempted(request)
    metrics.request_scheduled(request, num_cached_tokens=0)  # again, after the preemption
    metrics.request_finished(request, "length")
    assert (request.time_in_queue, request.time_to_first_token, request.end_to_end_time) == (1, 3, 10)
    assert (request.num_prompt_tokens, request.num_generation_tokens, request.num_cached_tokens) == (7, 4, 4)
    assert request.num_preemptions == 1
    assert request.last_token_time == 106
    snapshot = metrics.snapshot(IDLE)
    wanted = {
        "uptime_seconds": 10,
        "requests_total": 1,
        "requests_finished_length_total": 1,
        "requests_finished_stop_total": 0,
        "prompt_tokens_total": 7,
        "generation_tokens_total": 4,
        "preemptions_total": 1,
        "time_in_queue_seconds_mean": 1,
        "time_in_queue_count": 1,
        "time_to_first_token_seconds_mean": 3,
        "inter_token_latency_seconds_mean": 1,
        "inter_token_latency_count": 3,
        "end_to_end_time_seconds_p99": 10,
    }
    assert {name: snapshot[name] for name in wanted} == wanted


def test_samples_of_one_request_have_latencies_of_their_own() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    request = metrics.request_arrived(1)
    for index in (0, 1):
        clock.now += 1
        metrics.tokens_generated(request, 1, index=index)
    clock.now += 2
    metrics.tokens_generated(request, 1, index=0)  # 3 seconds after its first
    metrics.tokens_generated(request, 0, index=1)
    assert metrics.time_to_first_token.count == 1
    assert (metrics.inter_token_latency.count, metrics.inter_token_latency.mean) == (1, 3)
    assert request.num_generation_tokens == 3


def test_an_earlier_arrival_counts() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    request = metrics.request_arrived(1, arrival_time=95.0)
    metrics.request_scheduled(request)
    assert request.time_in_queue == 5


def test_steps() -> None:
    metrics = Metrics(Clock())
    for _ in range(2):
        metrics.step_done(StepTimes(num_rows=5, num_tokens=10, schedule=0.25, wait=0.25, device=4))
    metrics.step_done(StepTimes(wait=0.25))  # reads the last step and dispatches none
    state = EngineState(
        requests_running=3,
        requests_waiting=2,
        pages_used=8,
        num_pages=16,
        prefix_cache_queries=40,
        prefix_cache_hits=30,
    )
    snapshot = metrics.snapshot(state)
    wanted = {
        "steps_total": 2,
        "scheduled_tokens_total": 20,
        "step_time_seconds_mean": 0.5,
        "step_wait_count": 3,
        "step_wait_seconds_mean": 0.25,
        "requests_running": 3,
        "requests_waiting": 2,
        "pages_used": 8,
        "num_pages": 16,
        "pages_used_ratio": 0.5,
        "prefix_cache_queries_total": 40,
        "prefix_cache_hits_total": 30,
        "prefix_cache_hit_ratio": 0.75,
    }
    assert {name: snapshot[name] for name in wanted} == wanted


def test_a_snapshot_is_flat_and_documented_and_starts_at_zero() -> None:
    snapshot = Metrics(Clock()).snapshot(IDLE)
    assert set(snapshot.values()) == {0.0}
    assert all(type(value) is float for value in snapshot.values())
    documentation = Metrics.snapshot.__doc__ or ""
    listed = ("requests_finished_", "time_", "inter_token_", "end_to_end_", "step_")
    names = [name for name in snapshot if not name.startswith(listed)]
    assert [name for name in names if f"`{name}`" not in documentation] == []


def test_the_times_of_a_turn_that_waits_for_the_step_before() -> None:
    clock = Clock()
    steps = StepClock(clock)

    def turn(*, busy: bool, still_busy: bool, reads: float | None) -> StepTimes:
        """Schedules for 1 s, packs for 2, dispatches for 3, waits for 10, processes for 4."""
        steps.begin(busy=busy)
        clock.now += 1
        steps.scheduled(6, 7)
        clock.now += 5
        steps.dispatched(clock.now - 3, busy=still_busy)
        if reads is not None:
            clock.now += 10
            steps.read(reads)
        clock.now += 4
        return steps.end(idle=False)

    first = turn(busy=False, still_busy=False, reads=None)
    assert (first.num_rows, first.num_tokens, first.begin) == (6, 7, 100)
    assert (first.schedule, first.pack, first.dispatch, first.process) == (1, 2, 3, 4)
    assert (first.wait, first.device, first.gap, first.host, first.total) == (0, 0, 0, 10, 10)
    second = turn(busy=True, still_busy=True, reads=103)
    assert (second.wait, second.device, second.gap, second.total) == (10, 126 - 103, 0, 20)
    third = turn(busy=False, still_busy=False, reads=113)  # done before it was read, while outputs were made
    assert (third.gap, third.device) == (4 + 1 + 2 + 3, 146 - 126)
    fourth = turn(busy=True, still_busy=False, reads=133)  # it was still at work when this turn began
    assert fourth.gap == 6
    steps.end(idle=True)
    assert turn(busy=False, still_busy=False, reads=None).gap == 0


@given(st.lists(st.floats(1e-5, 900), min_size=1), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_are_right_to_their_bucket(values: list[float], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    assert histogram.count == len(values)
    assert histogram.mean == pytest.approx(statistics.fmean(values))
    exact = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    low = max((bound for bound in histogram.bounds if bound < exact), default=0.0)
    high = min((bound for bound in histogram.bounds if bound >= exact), default=math.inf)
    assert low <= histogram.quantile(share) <= high
    assert min(values) <= histogram.quantile(share) <= max(values)


def test_an_unknown_end_is_refused() -> None:
    metrics = Metrics(Clock())
    with pytest.raises(KeyError):
        metrics.request_finished(metrics.request_arrived(1), "boredom")
