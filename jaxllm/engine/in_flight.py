"""A step between its start on the device and the outputs that it brings."""

from dataclasses import dataclass

import jax

from jaxllm.engine.sample import Scored
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
