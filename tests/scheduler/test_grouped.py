"""Schedulers of several data groups as one: who goes where, and steps that run together."""

import pytest
from small_scheduler import FULL, request, run, scheduler, tokens_for

from jaxllm.scheduler import Request, RequestStatus, StepPlan
from jaxllm.scheduler.grouped import GroupedScheduler


def grouped(count: int = 2, **options: object) -> GroupedScheduler:
    return GroupedScheduler([scheduler(FULL, **options) for _ in range(count)])


def places(plan: StepPlan) -> dict[str, int]:
    """The group of each request that has a row."""
    return {row.request_id: group for group, part in enumerate(plan.parts) for row in part.rows}


def finish_all(grouped: GroupedScheduler) -> int:
    """Runs until nothing is left; the steps that it took."""
    steps = 0
    while grouped.num_running or grouped.num_waiting:
        run(grouped)  # pyright: ignore[reportArgumentType]
        steps += 1
    stats = grouped.cache_stats()
    assert stats.num_used == 0
    assert stats.num_free + stats.num_cached == stats.num_pages == 100 * len(grouped.groups)
    return steps


def test_requests_spread_and_rows_are_numbered_over_all_groups() -> None:
    both = grouped()
    for name in "abc":
        both.add(request(name, 9))
    plan = both.schedule()
    assert places(plan) == {"a": 0, "b": 1, "c": 0}
    assert [(row.request_id, row.row) for row in plan.rows] == [("a", 0), ("c", 1), ("b", 4)]
    assert {update.row for update in plan.page_updates} == {0, 1, 4}
    assert plan.admitted == ("a", "c", "b")
    assert (plan.num_tokens, plan.most_tokens) == (27, 18)
    assert plan.places(8) == [0, 1, 8]
    assert both.stats().waste == 0.25
    done = both.complete(plan, [[1], [2], [3]])
    assert [(one.request_id, new) for one, new in done] == [("a", [1]), ("c", [2]), ("b", [3])]
    assert finish_all(both) == 3


def test_a_group_without_work_gets_an_empty_part() -> None:
    both = grouped()
    both.add(request("a", 9))
    plan = both.schedule()
    assert plan.parts[1] == StepPlan()
    assert both.complete(plan, tokens_for(plan))
    assert both.schedule().parts[1] == StepPlan()


def test_a_prompt_goes_where_its_prefix_is_or_will_be() -> None:
    both = grouped()
    both.add(request("other", 20))
    prompt = list(range(40, 60))
    both.add(Request("first", prompt, 8))
    both.add(Request("same", [*prompt, 1], 8))  # which waits a step for the first one's pages
    assert places(both.schedule()) == {"other": 0, "first": 1}
    plan = both.schedule()
    assert places(plan)["same"] == 1
    assert plan.num_tokens == 3
    assert both.cache_stats().prefix_hits == 20


def test_requests_wait_for_rows_in_one_queue() -> None:
    both = grouped(max_num_seqs=1)
    for name in "abcd":
        both.add(request(name, 5, max_tokens=1 if name == "b" else 6))
    plan = run(both)  # pyright: ignore[reportArgumentType]
    assert places(plan) == {"a": 0, "b": 1}
    assert (both.num_running, both.num_waiting) == (1, 2)
    assert places(both.schedule()) == {"a": 0, "c": 1}, (
        "the first that waits takes the first row that is free"
    )


def test_ids_and_lengths_are_checked_at_once() -> None:
    both = grouped(max_num_seqs=1)
    waiting = [request(name, 5) for name in "abc"]
    for one in waiting:
        both.add(one)
    both.schedule()
    for name in "ac":  # one that runs, one that waits for a group
        with pytest.raises(ValueError, match="an unfinished request has this id"):
            both.add(request(name, 5))
    with pytest.raises(ValueError, match="more than max_model_len"):
        both.add(request("long", 500))
    waiting[2].request_id = "renamed"
    with pytest.raises(ValueError, match="was added before"):
        both.add(waiting[2])


def test_requests_end_wherever_they_are() -> None:
    both = grouped(max_num_seqs=1)
    for name in "abc":
        both.add(request(name, 5))
    plan = both.schedule()
    for name in "abc":
        ended = both.finish(name, RequestStatus.FINISHED_ABORTED)
        assert ended is not None
        assert ended.status is RequestStatus.FINISHED_ABORTED
        assert both.finish(name, RequestStatus.FINISHED_ABORTED) is None
    assert both.complete(plan, tokens_for(plan)) == []
    assert finish_all(both) == 0
    with pytest.raises(ValueError, match="must be one of the FINISHED ones"):
        both.finish("a", RequestStatus.RUNNING)


def test_after_a_failed_step_waiting_requests_go_on() -> None:
    both = grouped(max_num_seqs=1)
    for name in "abc":
        both.add(request(name, 5))
    both.schedule()
    assert {one.request_id for one in both.abandon()} == {"a", "b"}
    assert (both.num_running, both.num_waiting) == (0, 1)
    assert places(both.schedule()) == {"c": 0}
    both.clear()
    assert (both.num_running, both.num_waiting) == (0, 0)
    both.add(request("a", 5))
    assert finish_all(both) == 4


def test_a_group_preempts_its_own_and_takes_them_back() -> None:
    both = GroupedScheduler([scheduler(FULL, num_pages=8) for _ in range(2)])
    for name in "abcd":
        both.add(request(name, 9, max_tokens=12))
    homes, preempted = {}, 0
    while both.num_running or both.num_waiting:
        plan = both.schedule()
        for name, group in places(plan).items():
            assert homes.setdefault(name, group) == group
        preempted += len(plan.preempted)
        both.complete(plan, tokens_for(plan))
    assert preempted
    assert both.stats().num_preemptions == preempted


def test_the_prefix_cache_is_reset_in_all_groups_or_in_none() -> None:
    both = grouped()
    for name in "ab":
        both.add(request(name, 9, max_tokens=1 if name == "a" else 3))
    run(both)  # pyright: ignore[reportArgumentType]
    assert both.caches[0].stats().num_cached == 2
    assert not both.reset_prefix_cache()
    assert both.caches[0].stats().num_cached == 2
    finish_all(both)
    assert both.reset_prefix_cache()
    assert both.cache_stats().num_cached == 0


def test_limits_are_of_all_groups_rows() -> None:
    assert grouped(3).limits.max_num_seqs == 12
