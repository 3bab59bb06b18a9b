"""A step between its start on the device and the outputs that it brings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax

from jaxllm.engine.sample import HeldRow, Scored
from jaxllm.runner.runner import DispatchedStep
from jaxllm.scheduler.request import Request

NewTokens = list[tuple[Request, list[int]]]
"""What a step has brought to requests; none where it did not sample."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that the device works on, and what is to be read from it."""

    step: DispatchedStep
    logprobs: tuple[jax.Array, ...] | None
    scores: tuple[jax.Array, ...] | None
    scored: tuple[Scored, ...]
    """The prompts in `scores`."""


def num_needed(steps: Iterable[InFlight], held: Sequence[HeldRow]) -> int:
    """How many of the oldest steps are to be read for all that those rows' grammars have to know."""
    if not held:
        return 0
    names = {sample.request.request_id for _, sample, _ in held}
    return max((n for n, one in enumerate(steps, 1) if names & one.step.plan.request_ids), default=0)
