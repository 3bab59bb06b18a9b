"""What a step costs the host: by rows that run, and by requests that wait.

    python tests/scheduler/bench_scheduler.py

No test: it prints microseconds of one `schedule` and one `complete`, on whatever machine it runs.
"""

import time

from jaxllm.cache import CacheManager, group_layers
from jaxllm.scheduler import Request, Scheduler, StepPlan

STEPS = 300
LAYOUTS = {"full": (None,), "full + 2 sliding": (None, 128, 128)}


def sampled(plan: StepPlan) -> list[list[int]]:
    return [[7] if row.samples else [] for row in plan.rows]


def microseconds(windows: tuple[int | None, ...], num_running: int, num_waiting: int) -> tuple[float, float]:
    """Mean cost of schedule and complete while rows decode and others wait in vain for one."""
    cache = CacheManager(group_layers(windows).groups, num_pages=300_000, page_size=16)
    scheduler = Scheduler(cache, max_num_seqs=num_running, max_num_batched_tokens=2048, max_model_len=4096)
    for number in range(num_running + num_waiting):
        prompt = [number % 1000, *range(200)]
        scheduler.add(Request(str(number), prompt, max_tokens=3000))
    while scheduler.num_running < num_running or any(not r.output_token_ids for r in scheduler.running):
        plan = scheduler.schedule()
        scheduler.complete(plan, sampled(plan))
    planning = completing = 0.0
    for _ in range(STEPS):
        begin = time.process_time()
        plan = scheduler.schedule()
        planned = time.process_time()
        scheduler.complete(plan, sampled(plan))
        completing += time.process_time() - planned
        planning += planned - begin
    return 1e6 * planning / STEPS, 1e6 * completing / STEPS


def main() -> None:
    print(f"{'layers':18} {'running':>8} {'waiting':>8} {'schedule us':>12} {'complete us':>12}")
    for name, windows in LAYOUTS.items():
        for num_running in (1, 8, 64, 256):
            for num_waiting in (10, 10_000):
                planning, completing = microseconds(windows, num_running, num_waiting)
                print(f"{name:18} {num_running:8} {num_waiting:8} {planning:12.1f} {completing:12.1f}")


if __name__ == "__main__":
    main()
