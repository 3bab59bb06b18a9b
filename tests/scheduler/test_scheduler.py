"""The scheduler's rules, one by one. That they hold together is in test_histories.py."""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from simulation import Setup, Simulation

from jaxllm.cache import CacheManager, GroupSpec
from jaxllm.scheduler import Request, RequestStatus, RowPlan, Scheduler, StepPlan

FULL = (GroupSpec(None, (0,)),)
MIXED = (GroupSpec(None, (0,)), GroupSpec(8, (1,)))


def scheduler(groups: tuple[GroupSpec, ...] = FULL, num_pages: int = 101, **options: object) -> Scheduler:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 400, **options}
    return Scheduler(CacheManager(groups, num_pages=num_pages, page_size=4), **limits)  # pyright: ignore[reportArgumentType]


def request(name: str, prompt: int, max_tokens: int = 4, **options: object) -> Request:
    """A request with a prompt that is like no other's."""
    token_ids = [sum(name.encode()), *range(prompt - 1)]
    return Request(name, token_ids, max_tokens, **options)  # pyright: ignore[reportArgumentType]


def tokens_for(plan: StepPlan) -> list[list[int]]:
    return [[9] if row.samples else [] for row in plan.rows]


def run(scheduler: Scheduler, steps: int = 1) -> StepPlan:
    """Runs steps one after the other; the last plan."""
    plan = StepPlan()
    for _ in range(steps):
        plan = scheduler.schedule()
        scheduler.complete(plan, tokens_for(plan))
    return plan


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


# Preempting


def crowd(policy: str = "fcfs", priorities: tuple[int, ...] = (0, 0, 0)) -> tuple[Scheduler, list[Request]]:
    """Three requests that fill a pool of six pages, and each need another page in the next step."""
    s = scheduler(num_pages=7, policy=policy)
    requests = [request(n, 7, 8, priority=p) for n, p in zip("abc", priorities, strict=True)]
    for r in requests:
        s.add(r)
    run(s, steps=2)
    assert s.cache.pool.num_available == 0
    return s, requests


def test_the_newest_is_preempted_for_the_oldest() -> None:
    s, (a, _, c) = crowd()
    plan = s.schedule()
    # c's two pages serve a and b.
    assert (plan.preempted, [r.request_id for r in plan.rows]) == (("c",), ["a", "b"])
    assert (c.status, c.row, c.num_computed_tokens, c.num_preemptions) == (RequestStatus.WAITING, None, 0, 1)
    s.complete(plan, tokens_for(plan))
    outputs = list(c.output_token_ids)
    while c.status is RequestStatus.WAITING:
        plan = run(s)
    assert a.status is RequestStatus.FINISHED_LENGTH
    assert plan.admitted == ("c",)
    assert c.token_ids[7 : 7 + len(outputs)] == outputs, "what it had sampled is kept and computed again"


def test_the_lowest_priority_is_preempted_first() -> None:
    s, _ = crowd("priority", priorities=(2, 1, 2))
    assert s.schedule().preempted == ("c",)
    s, _ = crowd("priority", priorities=(2, 1, 1))
    assert s.schedule().preempted == ("a",)


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    s, _ = crowd()
    s.add(request("d", prompt=1, max_tokens=1))
    plan = s.schedule()
    assert plan.preempted
    assert not plan.admitted


def test_the_last_in_order_waits_in_its_row_when_no_page_is_left() -> None:
    s = scheduler(num_pages=5)
    s.add(request("a", prompt=6, max_tokens=2))
    s.add(request("b", prompt=8, max_tokens=3))
    assert len(run(s).rows) == 2
    plan = s.schedule()  # a has room in its page, b needs another and there is none
    assert [r.request_id for r in plan.rows] == ["a"]
    assert not plan.preempted
    s.complete(plan, tokens_for(plan))
    plan = run(s)
    assert [(r.request_id, r.start) for r in plan.rows] == [("b", 8)], "it computed nothing again"


@pytest.mark.parametrize("max_tokens", [2, 8])
def test_a_preempted_request_gets_its_token_in_flight_while_it_waits(max_tokens: int) -> None:
    s = scheduler(num_pages=7)
    requests = [request(n, 7, max_tokens if n == "c" else 8) for n in "abc"]
    for r in requests:
        s.add(r)
    run(s)
    flying, ahead = s.schedule(), s.schedule()
    c = requests[2]
    assert (ahead.preempted, c.status, c.num_in_flight) == (("c",), RequestStatus.WAITING, 1)
    assert (c, [7]) in s.complete(flying, [[5], [6], [7]])
    assert (c.output_token_ids, c.num_in_flight) == ([9, 7], 0)
    assert c.status is (RequestStatus.FINISHED_LENGTH if max_tokens == 2 else RequestStatus.WAITING)
    assert s.num_waiting == (0 if max_tokens == 2 else 1)


def test_preempted_prompts_longer_than_a_step_come_back_in_pieces() -> None:
    s = scheduler(num_pages=21, max_num_batched_tokens=16, enable_chunked_prefill=False)
    requests = [request(n, prompt=14, max_tokens=40) for n in "ab"]
    for r in requests:
        s.add(r)
    while s.has_unfinished:
        plan = run(s)
        assert plan.rows
    assert all(len(r.output_token_ids) == 40 for r in requests)
    assert requests[1].num_preemptions > 0


# Admitting


def test_a_prompt_is_admitted_when_all_of_it_fits() -> None:
    """Ten pages: two prompts of seven would push each other out, so the second waits."""
    s = scheduler(num_pages=11, max_num_batched_tokens=8)
    s.add(request("a", prompt=28))
    s.add(request("b", prompt=28))
    s.add(request("c", prompt=1, max_tokens=1))
    assert run(s).admitted == ("a",)
    assert run(s).admitted == (), "and c does not overtake it"
    while s.has_unfinished:
        run(s)
    assert s.stats().num_preemptions == 0


def test_a_prompt_under_way_keeps_others_out_of_the_pages_it_needs() -> None:
    """Both prompts would fit what is free after the first step, but not together."""
    s = scheduler(num_pages=11, max_num_batched_tokens=12)
    s.add(request("a", prompt=24))
    run(s)
    s.add(request("b", prompt=24))
    run(s, steps=3)
    assert [r.request_id for r in s.running] == ["a"]


def test_a_sliding_layer_is_asked_for_its_window_and_not_for_the_prompt() -> None:
    s = scheduler((GroupSpec(8, (0,)),), num_pages=7, max_num_batched_tokens=8)
    s.add(request("r", prompt=200))
    assert run(s).admitted == ("r",)
    most = 0
    while s.has_unfinished:
        run(s)
        most = max(most, s.cache.pool.num_used)
    assert most <= 5


def test_a_chunk_shrinks_to_what_fits_beside_the_window() -> None:
    s = scheduler((GroupSpec(8, (0,)),), num_pages=4, max_num_batched_tokens=32)
    s.add(request("r", prompt=50))
    plans = []
    while s.has_unfinished:
        plans.append(run(s))
    assert [row.num_tokens for plan in plans for row in plan.rows][:3] == [12, 4, 4]


# Prefixes


def test_a_prompt_seen_before_is_computed_from_where_it_differs() -> None:
    s = scheduler(MIXED)
    shared = list(range(20))
    s.add(Request("a", [*shared, 50], max_tokens=2))
    run(s, steps=2)
    b = Request("b", [*shared, 60, 61], max_tokens=1)
    s.add(b)
    plan = run(s)
    assert plan.rows == (RowPlan("b", 0, 20, 2, True),)
    assert b.num_cached_tokens == 20
    given = {u.group: u.pages for u in plan.page_updates if u.index == 0}
    assert len(given[0]) == 5
    assert [page == 0 for page in given[1]] == [True, True, True, False, False]
    assert (s.stats().cache.prefix_queries, s.stats().cache.prefix_hits) == (21 + 22, 20)


def test_a_request_can_ask_to_compute_all_its_tokens() -> None:
    s = scheduler()
    for name in "ab":
        r = Request(name, list(range(20)), max_tokens=1, skip_prefix_cache=name == "b")
        s.add(r)
        assert run(s).num_tokens == 20
        assert r.num_cached_tokens == 0
    assert s.stats().cache.prefix_queries == 20, "it is no query either"


def test_coming_back_after_preemption_is_no_query() -> None:
    s, requests = crowd()
    queries = s.stats().cache.prefix_queries
    while s.has_unfinished:
        run(s)
    assert sum(r.num_preemptions for r in requests) > 0
    assert s.stats().cache.prefix_queries == queries == 21
    assert all(r.num_cached_tokens == 0 for r in requests)


def test_the_prefix_cache_is_reset_when_nothing_runs() -> None:
    s = scheduler()
    s.add(request("a", prompt=20, max_tokens=1))
    plan = s.schedule()
    assert not s.reset_prefix_cache()
    s.complete(plan, [[1]])
    assert s.reset_prefix_cache()
    s.add(request("a", prompt=20, max_tokens=1))
    assert run(s).num_tokens == 20


def test_after_a_failed_step_waiting_requests_go_on() -> None:
    s = scheduler(max_num_seqs=2)
    for name in "abc":
        s.add(request(name, prompt=9))
    run(s)
    s.schedule()
    s.schedule()
    failed = s.abandon()
    assert [r.request_id for r in failed] == ["a", "b"]
    assert all(r.status is RequestStatus.FINISHED_ERROR for r in failed)
    assert (s.num_in_flight, s.num_running, s.num_waiting, s.cache.pool.num_free) == (0, 0, 1, 100)
    plan = run(s)
    assert plan.rows == (RowPlan("c", 0, 0, 9, True),)


# Cost


def operations(work: Callable[[], object]) -> int:
    """Calls of functions, Python's and C's, while `work` runs."""
    count = 0

    def on_event(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(None)
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
