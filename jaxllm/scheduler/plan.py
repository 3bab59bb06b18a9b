"""What one step runs. Plans are immutable and speak of requests by id and row, never by object."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
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


@dataclass(frozen=True)
class StepPlan:
    """One step: rows that compute a single token first, then the others; or the steps of several data groups,
    which run as one.

    admitted: requests that got a row in this step, new or resumed; their page updates give the whole table,
        with the null page where a window has already passed.
    preempted: requests that lost their row in this step. A plan may have these and no rows.
    groups: where there are several data groups, each one's own plan; a group may have nothing to do.
    """

    rows: tuple[RowPlan, ...] = ()
    admitted: tuple[str, ...] = ()
    page_updates: tuple[PageUpdate, ...] = ()
    preempted: tuple[str, ...] = ()
    groups: tuple["StepPlan", ...] = ()

    @classmethod
    def join(cls, groups: Sequence["StepPlan"], num_rows: int) -> "StepPlan":
        """The steps of all data groups as one; each has `num_rows` rows, numbered one after the other."""
        first = range(0, len(groups) * num_rows, num_rows)
        return cls(
            tuple(
                row._replace(row=n + row.row)
                for n, plan in zip(first, groups, strict=True)
                for row in plan.rows
            ),
            tuple(chain.from_iterable(plan.admitted for plan in groups)),
            tuple(
                replace(update, row=n + update.row)
                for n, plan in zip(first, groups, strict=True)
                for update in plan.page_updates
            ),
            tuple(chain.from_iterable(plan.preempted for plan in groups)),
            tuple(groups),
        )

    @property
    def parts(self) -> tuple["StepPlan", ...]:
        """The plan of each data group, with rows numbered as the group has them."""
        return self.groups or (self,)

    def places(self, size: int) -> list[int]:
        """Where each row's entry is in an array with `size` entries, one for each row, of each data group."""
        return [group * size + i for group, plan in enumerate(self.parts) for i in range(len(plan.rows))]

    @cached_property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def most_tokens(self) -> int:
        """Of a data group: what the step's program has to hold for each."""
        return max(plan.num_tokens for plan in self.parts)

    @property
    def most_rows(self) -> int:
        """Of a data group, likewise."""
        return max(len(plan.rows) for plan in self.parts)

    @property
    def request_ids(self) -> frozenset[str]:
        """Requests that have a row in the step."""
        return frozenset(row.request_id for row in self.rows)

    @property
    def num_decode_rows(self) -> int:
        """Leading rows that compute a single token."""
        return bisect_left(self.rows, True, key=lambda row: row.num_tokens > 1)
