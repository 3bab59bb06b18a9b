"""How long the stages of a model take together, of which each works on another step.

With `t[s]` the seconds of stage s, `x[s]` those of sending on what it has made, and M steps of different
requests under way, a request's next token comes after

    round = max(sum(t) + sum(x), M * max(t, x))

because a token goes through all stages, and the slowest stage, or link, has a part of all M steps to do. The
engine cuts the running requests into as many steps as there are stages. What stages wait is the bubble,

    bubble = 1 - M * sum(t) / (S * round)

with S stages. The K pieces of a prompt follow each other through them. Where all are alike that takes
(K + S - 1) * t, with the bubble (S - 1) / (K + S - 1) of GPipe (https://arxiv.org/abs/1811.06965);
`flow_seconds` takes them as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one stage's chips: the parts but the last follow each other.

    Attributes:
        products: everything that XLA compiled: products, norms, embeddings.
        kernels: what Pallas kernels do, counted from the sizes.
        transfer: sending what the next stage takes, while this one may work on the next step.
    """

    products: float
    kernels: float
    collectives: float
    sampling: float
    transfer: float = 0.0

    @property
    def total(self) -> float:
        """Of the work; what is sent is on its way meanwhile."""
        return self.products + self.kernels + self.collectives + self.sampling


def round_seconds(stages: Sequence[StepTime], steps: int) -> float:
    """From a step's start to that of the next one of the same requests.

    Args:
        stages: a step's time in each of them.
        steps: under way at a time, at most as many as stages.
    """
    alone = sum(time.total + time.transfer for time in stages)
    return max(alone, steps * max(max(time.total, time.transfer) for time in stages))


def bubble(stages: Sequence[StepTime], steps: int) -> float:
    """The share of the stages' time in which they wait."""
    return 1 - steps * sum(time.total for time in stages) / (len(stages) * round_seconds(stages, steps))


def flow_seconds(pieces: Sequence[Sequence[StepTime]]) -> float:
    """From the first step's start in the first stage to the last one's end in the last.

    Args:
        pieces: steps that follow each other, and for each its time in every stage.
    """
    free = [0.0] * len(pieces[0])  # when each stage has done what came before
    for stages in pieces:
        there = 0.0
        for index, time in enumerate(stages):
            free[index] = max(free[index], there) + time.total
            there = free[index] + time.transfer
    return free[-1]
