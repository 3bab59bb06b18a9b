"""The scheduler's rules, one by one. That they hold together is in test_histories.py."""

import gc
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from simulation import Setup, Simulation
from small_scheduler import MIXED, request, run, scheduler

from jaxllm.scheduler import Request, RequestStatus, RowPlan, StepPlan

# Planning


def test_a_request_from_prompt_to_end() -> None:
    s = scheduler()
    r = request("r", prompt=5, max_tokens=3)
    s.add(r)
    assert (s.num_waiting, s.num_running, r.status) == (1, 0, RequestStatus.WAITING)
    plan = s.schedule()
    assert plan.rows == (RowPlan("r", row=0, start=0, num_tokens=5, samples=True),)
    assert plan.admitted == ("r",)
    assert [(u.row, u.group, u.index, len(u.pages)) for u in plan.page_updates] == [(0, 0, 0, 2)]
    assert (r.num_computed_tokens, r.num_in_flight, r.status, r.row) == (5, 1, RequestStatus.RUNNING, 0)
    assert s.complete(plan, [[11]]) == [(r, [11])]
    assert (r.output_token_ids, r.token_ids[-1], r.num_in_flight) == ([11], 11, 0)
    plan = s.schedule()
    assert plan == StepPlan((RowPlan("r", 0, 5, 1, True),))
    assert (plan.num_tokens, plan.num_decode_rows) == (1, 1)
    s.complete(plan, [[12]])
    assert s.complete(s.schedule(), [[13]]) == [(r, [13])]
    assert (r.status, r.output_token_ids, r.row) == (RequestStatus.FINISHED_LENGTH, [11, 12, 13], None)
    assert not s.has_unfinished
    assert s.schedule() == StepPlan()


def test_a_long_prompt_is_spread_over_steps_and_decodes_go_along() -> None:
    s = scheduler()
    s.add(request("first", prompt=3, max_tokens=9))
    run(s)
    s.add(request("long", prompt=70))
    plans = [run(s) for _ in range(4)]
    assert [[(r.request_id, r.start, r.num_tokens, r.samples) for r in p.rows] for p in plans] == [
        [("first", 3, 1, True), ("long", 0, 31, False)],
        [("first", 4, 1, True), ("long", 31, 31, False)],
        [("first", 5, 1, True), ("long", 62, 8, True)],
        [("first", 6, 1, True), ("long", 70, 1, True)],
    ]
    assert [p.num_decode_rows for p in plans] == [1, 1, 1, 2]


def test_rows_of_one_token_come_first() -> None:
    s = scheduler()
    s.add(request("long", prompt=40))
    run(s)
    s.add(request("one", prompt=1))
    assert [(r.request_id, r.num_tokens) for r in run(s).rows] == [("one", 1), ("long", 8)]


def test_without_chunking_a_prompt_waits_for_a_step_that_takes_all_of_it() -> None:
    s = scheduler(enable_chunked_prefill=False)
    for name, prompt in [("a", 20), ("b", 20), ("c", 5)]:
        s.add(request(name, prompt))
    assert [r.request_id for r in run(s).rows] == ["a"], "c does not overtake b"
    assert [(r.request_id, r.num_tokens) for r in run(s).rows] == [("a", 1), ("b", 20), ("c", 5)]


def test_a_prompt_can_be_found_as_soon_as_it_has_been_computed() -> None:
    """Also while the first request goes on in a page that is not full, and needs no new one for a while."""
    small = scheduler()
    small.add(request("a", 18, max_tokens=9))
    run(small)
    twin = Request("b", request("a", 18).prompt_token_ids, 4)
    small.add(twin)
    plan = run(small)
    assert [(row.request_id, row.start) for row in plan.rows] == [("a", 18), ("b", 16)]
    assert twin.num_cached_tokens == 16


def test_rows_are_given_back_and_taken_again() -> None:
    s = scheduler(max_num_seqs=2)
    for name in "abc":
        s.add(request(name, prompt=2, max_tokens=1 if name == "a" else 5))
    assert run(s).admitted == ("a", "b")
    plan = run(s)
    assert plan.admitted == ("c",)
    assert {r.request_id: r.row for r in plan.rows} == {"b": 1, "c": 0}


def test_a_step_ahead_plans_for_tokens_in_flight() -> None:
    s = scheduler()
    r = request("r", prompt=4, max_tokens=2)
    s.add(r)
    first, second = s.schedule(), s.schedule()
    assert second.rows == (RowPlan("r", 0, 4, 1, True),)
    assert r.num_in_flight == 2
    assert s.schedule().rows == (), "max_tokens are in flight"
    assert s.complete(first, [[1]]) == [(r, [1])]
    assert s.complete(second, [[2]]) == [(r, [2])]
    assert r.status is RequestStatus.FINISHED_LENGTH


def test_tokens_of_a_request_that_has_ended_are_dropped() -> None:
    s = scheduler()
    old = request("r", prompt=4)
    s.add(old)
    plan = s.schedule()
    assert s.finish("r", RequestStatus.FINISHED_ABORTED) is old
    new = request("r", prompt=4)
    s.add(new)  # the id is free again, while a step of the old request is in flight
    assert s.complete(plan, [[1]]) == []
    assert (old.output_token_ids, new.output_token_ids) == ([], [])
    assert s.finish("nobody", RequestStatus.FINISHED_ABORTED) is None


def test_more_tokens_than_wanted_are_cut() -> None:
    s = scheduler()
    r = request("r", prompt=4, max_tokens=2)
    s.add(r)
    plan = s.schedule()
    assert s.complete(plan, [[1, 2, 3]]) == [(r, [1, 2])]
    assert r.status is RequestStatus.FINISHED_LENGTH


def test_plans_are_completed_in_order_and_in_full() -> None:
    s = scheduler()
    s.add(request("r", prompt=4))
    first, second = s.schedule(), s.schedule()
    with pytest.raises(ValueError, match="not the oldest plan"):
        s.complete(second, [[1]])
    with pytest.raises(ValueError, match="exactly the rows that sample"):
        s.complete(first, [[]])
    s.complete(first, [[1]])
    with pytest.raises(ValueError, match="not the oldest plan"):
        s.complete(first, [[1]])


def test_finish_takes_finished_states_only() -> None:
    s = scheduler()
    s.add(request("r", prompt=4))
    with pytest.raises(ValueError, match="RUNNING"):
        s.finish("r", RequestStatus.RUNNING)


# Refusing


@pytest.mark.parametrize(
    ("options", "prompt", "max_tokens", "message"),
    [
        (
            {"max_model_len": 20},
            15,
            6,
            "15 prompt tokens and max_tokens=6 make 21, more than max_model_len=20",
        ),
        ({"num_pages": 6}, 15, 7, "need 6 pages of 4 tokens and the cache has 5"),
        (
            {"enable_chunked_prefill": False},
            33,
            1,
            "33 prompt tokens are more than max_num_batched_tokens=32",
        ),
        ({"groups": MIXED, "num_pages": 8, "enable_chunked_prefill": False}, 13, 1, "need 8 pages of 4"),
    ],
)
def test_what_can_never_run_is_refused(
    options: dict[str, object], prompt: int, max_tokens: int, message: str
) -> None:
    s = scheduler(**options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=message):
        s.add(request("r", prompt, max_tokens))
    assert not s.has_unfinished
    s.add(request("r", prompt - 1, max_tokens))


def test_ids_are_unique_among_the_living_and_requests_are_added_once() -> None:
    s = scheduler()
    r = request("r", prompt=2, max_tokens=1)
    s.add(r)
    with pytest.raises(ValueError, match="an unfinished request has this id"):
        s.add(request("r", prompt=2))
    run(s)
    with pytest.raises(ValueError, match="was added before"):
        s.add(r)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_limits_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        scheduler(**{name: 0})  # pyright: ignore[reportArgumentType]


def test_policies_are_checked() -> None:
    with pytest.raises(ValueError, match="policy='sjf'"):
        scheduler(policy="sjf")


def test_requests_are_checked() -> None:
    with pytest.raises(ValueError, match="prompt_token_ids is empty"):
        Request("r", [], 1)
    with pytest.raises(ValueError, match="max_tokens=0"):
        Request("r", [1], 0)


def smallest(setup: Setup, request: Request) -> Simulation:
    """One with the smallest pool that takes the request."""
    return next(
        simulation
        for num_pages in range(2, 200)
        for simulation in [Simulation(replace(setup, num_pages=num_pages))]
        if simulation.add(request)
    )


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("budget", [1, 5, 64])
@pytest.mark.parametrize("windows", [(None,), (None, 1), (None, 5, 12), (6,), (17, 3)])
def test_whatever_fits_the_whole_pool_runs_in_it(
    windows: tuple[int | None, ...], budget: int, chunked: bool
) -> None:
    """In the smallest pool that takes it a request runs to its end; one page fewer is refused."""
    setup = Setup(windows, max_num_seqs=2, budget=budget, chunked=chunked)
    for prompt in (1, 5, 23):
        for max_tokens in (1, 2, 19):
            if not chunked and prompt > budget:
                continue
            simulation = smallest(setup, Request("r", [1] * prompt, max_tokens))
            simulation.drain()
            assert simulation.scheduler.stats().num_preemptions == 0


# Cost


def operations(work: Callable[[], object]) -> int:
    """Calls of functions, Python's and C's, while `work` runs, and not the garbage collector."""
    count = 0

    def on_event(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # whose callbacks and finalizers are calls, too
    sys.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_step_costs_the_same_however_many_wait(policy: str) -> None:
    """With 10 and with 10,000 waiting: steps that decode, that admit, that preempt, and aborts."""

    def costs(num_waiting: int) -> list[int]:
        s = scheduler(num_pages=13, policy=policy)
        for number in range(num_waiting + 3):
            s.add(Request(str(number), [number, *range(6)], max_tokens=12))
        return [operations(lambda: run(s)) for _ in range(40)] + [
            operations(lambda: s.finish("7", RequestStatus.FINISHED_ABORTED)),
            operations(lambda: s.schedule()),
        ]

    few = costs(20)
    assert few == costs(10_000)
    assert len(set(few)) > 3, "the steps were of several kinds"


# Requests that begin alike


def alike(name: str, own: int, shared: int = 20) -> Request:
    return Request(name, [*range(100, 100 + shared), *[len(name) * 7 + ord(name[-1])] * own], 3)


def test_a_prompt_is_computed_once_for_all_who_come_together() -> None:
    s = scheduler(max_num_batched_tokens=100)
    for name in "abc":
        s.add(alike(name, own=2))
    s.add(request("other", prompt=6))
    assert [(r.request_id, r.start, r.num_tokens) for r in run(s).rows] == [("a", 0, 22)]
    rows = [(r.request_id, r.start, r.num_tokens) for r in run(s).rows]
    assert rows == [("a", 22, 1), ("b", 20, 2), ("c", 20, 2), ("other", 0, 6)]


def test_the_prompt_of_one_token_to_sample_is_found_too() -> None:
    """It has nothing left to compute when the next step is planned before its token has come."""
    s = scheduler(max_num_batched_tokens=100)
    for name in "ab":
        s.add(Request(name, range(21), 1))
    assert [r.num_tokens for r in s.schedule().rows] == [21]
    assert [(r.request_id, r.start, r.num_tokens) for r in s.schedule().rows] == [("b", 20, 1)]


@pytest.mark.parametrize(
    ("own", "options"), [(21, {}), (2, {"skip_prefix_cache": True}), (2, {"cache_salt": "salt"})]
)
def test_nobody_waits_for_what_saves_little_or_nothing(own: int, options: dict[str, object]) -> None:
    s = scheduler(max_num_batched_tokens=100)
    s.add(alike("a", own=2))
    second = alike("b", own)
    s.add(Request("b", second.prompt_token_ids, 3, **options))
    assert [(r.request_id, r.start) for r in run(s).rows] == [("a", 0), ("b", 0)]
