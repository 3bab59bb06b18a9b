"""Steps for a model in stages: no request is in two that are computed at a time."""

import pytest
from small_scheduler import request, scheduler, tokens_for

from jaxllm.scheduler import StepPlan


def ids(plan: StepPlan) -> list[str]:
    return [row.request_id for row in plan.rows]


def test_requests_take_turns() -> None:
    s = scheduler(num_stages=2)
    for name in "abc":
        s.add(request(name, prompt=4, max_tokens=9))
    first = s.schedule()
    assert ids(first) == ["a", "b", "c"]
    assert not s.schedule().rows, "everybody's next token is computed by the other stage"
    s.complete(first, tokens_for(first))
    plans = [s.schedule() for _ in range(3)]
    assert [ids(plan) for plan in plans] == [["a", "b"], ["c"], ["a", "b"]]
    assert [row.start for row in plans[2].rows] == [5, 5]
    for plan in plans:
        s.complete(plan, tokens_for(plan))
    assert [ids(s.schedule()) for _ in range(2)] == [["a", "b"], ["c"]]


def test_a_long_prompt_goes_through_all_stages_at_once() -> None:
    """Its pieces need no sampled token."""
    s = scheduler(num_stages=3)
    s.add(request("long", prompt=70))
    assert [s.schedule().num_tokens for _ in range(4)] == [32, 32, 6, 0]


def test_bad_number() -> None:
    with pytest.raises(ValueError, match="num_stages=0"):
        scheduler(num_stages=0)
