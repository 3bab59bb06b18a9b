"""Tokens a second, many requests at once or arriving at a rate."""

from collections.abc import Sequence
from typing import Any

from jaxllm.bench.figures import spread
from jaxllm.bench.session import Run, Session
from jaxllm.bench.workload import Item

WARM_PROMPTS, WARM_TOKENS = 2, 8
"""What runs before anything is timed."""


def warm(session: Session, items: Sequence[Item]) -> None:
    """Runs a little of the workload."""
    few = [Item(item.prompt, min(WARM_TOKENS, item.output_len)) for item in items[:WARM_PROMPTS]]
    session.serve(few)


def measure(session: Session, items: Sequence[Item], rounds: int) -> tuple[dict[str, Any], Run]:
    """Runs the requests `rounds` times; the throughput of all, the figures of the best, and that one."""
    warm(session, items)
    runs = [_run(session, items) for _ in range(rounds)]
    best = max(runs, key=lambda run: run.output_tokens / run.seconds)
    rates = spread([run.output_tokens / run.seconds for run in runs], most=True)
    totals = spread([(run.prompt_tokens + run.output_tokens) / run.seconds for run in runs], most=True)
    return {
        "output_tokens_per_second": rates,
        "total_tokens_per_second": totals,
        "best_round": best.figures(),
    }, best


def _run(session: Session, items: Sequence[Item]) -> Run:
    """At once through `Engine.generate` where that can be said with it, as a peer's user would."""
    plain = all(item.due == 0 and not item.is_chat for item in items)
    if plain and len({item.output_len for item in items}) == 1:
        return session.generate([item.prompt for item in items], items[0].output_len)
    return session.serve(items)
