"""Small schedulers and requests for tests of single rules."""

from jaxllm.cache import CacheManager, GroupSpec
from jaxllm.scheduler import Request, Scheduler, StepPlan

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
