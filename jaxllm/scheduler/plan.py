"""What one step runs. Plans are immutable and speak of requests by id and row, never by object."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple


class RowPlan(NamedTuple):
    """One request's part in a step.

    start: tokens computed before this step.
    num_tokens: tokens to compute, at positions start to start + num_tokens - 1.
    samples: the step ends at the newest known token, so the next one is sampled.
    """

    request_id: str
    row: int
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class PageUpdate:
    """Pages appended to a row's page table of one group, from column `index` on.

    A page once given stays until the row is given to another request, whose first updates begin at column 0.
    A sliding group's leading pages may be taken back and used elsewhere without an update when no query of
    this step or a later one can see them.
    """

    row: int
    group: int
    index: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: rows that compute a single token first, then the others.

    admitted: requests that got a row in this step, new or resumed; their page updates give the whole table,
        with the null page where a window has already passed.
    preempted: requests that lost their row in this step. A plan may have these and no rows.
    """

    rows: tuple[RowPlan, ...] = ()
    admitted: tuple[str, ...] = ()
    page_updates: tuple[PageUpdate, ...] = ()
    preempted: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def request_ids(self) -> frozenset[str]:
        """Requests that have a row in the step."""
        return frozenset(row.request_id for row in self.rows)

    @property
    def num_decode_rows(self) -> int:
        """Leading rows that compute a single token."""
        return bisect_left(self.rows, True, key=lambda row: row.num_tokens > 1)
