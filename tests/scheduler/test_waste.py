"""How many slots of the pages that requests hold have no token in them."""

import random

import pytest

from jaxllm.cache import CacheManager, group_layers
from jaxllm.scheduler import Request, Scheduler

WORKLOADS = {
    "full layers": [None] * 30,
    "every second layer slides": [1024, None] * 13,
    "five of six layers slide": [None if layer % 6 == 5 else 512 for layer in range(26)],
}


@pytest.mark.parametrize("layers", WORKLOADS)
def test_less_than_four_percent_of_the_pages_is_wasted(layers: str) -> None:
    """200 requests of 100 to 1,200 tokens, some with a common beginning, 32 at a time, in pages of 16."""
    groups = group_layers(WORKLOADS[layers]).groups
    cache = CacheManager(groups, num_pages=2000 * len(groups), page_size=16)
    scheduler = Scheduler(cache, max_num_seqs=32, max_num_batched_tokens=512, max_model_len=2048)
    rng = random.Random(layers)
    system = [rng.randrange(1000) for _ in range(150)]
    for number in range(200):
        prompt = [rng.randrange(1000) for _ in range(rng.randint(100, 800))]
        prompt = system + prompt if number % 3 == 0 else prompt
        scheduler.add(Request(str(number), prompt, max_tokens=rng.randint(20, 400)))
    slots = wasted = 0.0
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        stats = scheduler.stats()
        slots += stats.cache.num_used
        wasted += stats.waste * stats.cache.num_used
        scheduler.complete(plan, [[1] if row.samples else [] for row in plan.rows])
    print(f"{layers}: {wasted / slots:.2%} wasted")
    assert 0 < wasted / slots < 0.04
