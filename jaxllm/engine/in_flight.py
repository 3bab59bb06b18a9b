"""What a step in flight brings, and for whom."""

from dataclasses import dataclass

import jax
import numpy as np

from jaxllm.engine.assembler import OutputAssembler, TokenLogprobs
from jaxllm.runner.runner import DispatchedStep
from jaxllm.scheduler.request import Request


@dataclass(slots=True, eq=False)
class Sample:
    """One of a request's outputs, as it is scheduled: `n` of them share an assembler."""

    request: Request
    index: int
    seed: int
    assembler: OutputAssembler
    next_scored: int = 1
    """First position of the prompt whose logprobs no dispatched step computes."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that the device works on, and what is to be read from it."""

    step: DispatchedStep
    logprobs: tuple[jax.Array, ...] | None
    scores: tuple[jax.Array, ...] | None
    scored: tuple[tuple[Sample, int, int], ...]
    """For each prompt in `scores`: where its tokens begin in the flat batch, and how many there are."""


class StepLogprobs:
    """What `token_logprobs` left on the device, read when the first position of it is asked for."""

    def __init__(self, arrays: tuple[jax.Array, ...] | None) -> None:
        self._arrays = arrays
        self._read: list[np.ndarray] = []

    def __getitem__(self, position: int) -> TokenLogprobs:
        if not self._read:
            assert self._arrays is not None
            self._read = [np.asarray(array) for array in self._arrays]
        logprob, rank, ids, top = (array[position] for array in self._read)
        return TokenLogprobs(float(logprob), int(rank), ids.tolist(), top.tolist())
