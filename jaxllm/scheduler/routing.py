"""Which replica serves a request: the one that has its prefix, unless others have much less to do."""

from collections.abc import Sequence
from dataclasses import dataclass

WORTH = 0.25
"""How much more a replica may have to do, as a share of its rows, if its cache has all of a prompt; if it has
half of the prompt, half as much."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could take a request now."""

    load: int
    """Outputs that it makes already, or has been given to make."""
    num_found: int
    """Leading tokens of the prompt that its cache holds, or will once the requests it has are computed."""


def choose_replica(candidates: Sequence[Candidate], num_tokens: int, num_rows: int) -> int:
    """The index of the best one: a prefix and a short queue are weighed against each other.

    Of equals the first is taken. The load counts in outputs, since each costs a row in every step; what a
    prefix saves is worth at most `WORTH * num_rows` of them.

    Args:
        candidates: at least one.
        num_tokens: of the prompt.
        num_rows: that each replica has.
    """

    def score(index: int) -> float:
        candidate = candidates[index]
        return WORTH * num_rows * candidate.num_found / num_tokens - candidate.load

    return max(range(len(candidates)), key=score)
