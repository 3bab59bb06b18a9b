"""What planning costs the host, by rows that run and by requests that wait. Needs no JAX and no model."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from jaxllm.cache import CacheManager, group_layers
from jaxllm.scheduler import Request, Scheduler, StepPlan

WAITING = (10, 100, 1_000, 10_000)
RUNNING = (1, 32, 256)
PROMPT_LEN = 200


def measure(
    *, waiting: Sequence[int] = WAITING, running: Sequence[int] = RUNNING, steps: int = 300
) -> dict[str, Any]:
    """Microseconds of a step while rows decode and others wait in vain for one.

    `growth` is, for each number of rows, the cost with the most waiting by that with the fewest.
    """
    points = [_point(rows, queue, steps) for rows in running for queue in waiting]
    growth = {}
    for rows in running:
        costs = [point["step_us"] for point in points if point["running"] == rows]
        growth[str(rows)] = costs[-1] / costs[0]
    return {"steps": steps, "points": points, "growth": growth}


def _point(running: int, waiting: int, steps: int) -> dict[str, Any]:
    length = PROMPT_LEN + steps + 2
    pages = 2 + (running + 1) * -(-length // 16)
    cache = CacheManager(group_layers((None,)).groups, num_pages=pages, page_size=16)
    scheduler = Scheduler(cache, max_num_seqs=running, max_num_batched_tokens=2048, max_model_len=length)
    for number in range(running + waiting):
        prompt = [number, *range(PROMPT_LEN - 1)]
        scheduler.add(Request(str(number), prompt, max_tokens=steps + 2))
    while scheduler.num_running < running or any(not r.output_token_ids for r in scheduler.running):
        plan = scheduler.schedule()
        scheduler.complete(plan, _sampled(plan))
    planning, completing = [], []
    while len(planning) < steps and all(len(r.output_token_ids) < steps + 1 for r in scheduler.running):
        begin = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        tokens = _sampled(plan)
        sampled = time.perf_counter()
        scheduler.complete(plan, tokens)
        completing.append(time.perf_counter() - sampled)
        planning.append(planned - begin)
    schedule, complete = _microseconds(planning), _microseconds(completing)
    return {
        "running": running,
        "waiting": waiting,
        "schedule_us": schedule,
        "complete_us": complete,
        "step_us": schedule + complete,
    }


def _microseconds(times: Sequence[float]) -> float:
    """The best of three medians, each of a third of the steps: other work may have disturbed the rest."""
    third = -(-len(times) // 3)
    return 1e6 * min(statistics.median(times[i : i + third]) for i in range(0, len(times), third))


def _sampled(plan: StepPlan) -> list[list[int]]:
    return [[7] if row.samples else [] for row in plan.rows]
