"""What the scheduler does when pages are short: who is preempted, who is admitted, what is found again."""

import pytest
from small_scheduler import MIXED, request, run, scheduler, tokens_for

from jaxllm.cache import GroupSpec
from jaxllm.scheduler import Request, RequestStatus, RowPlan, Scheduler

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
