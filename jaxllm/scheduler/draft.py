"""A step while it is being planned."""

from collections.abc import Sequence

from jaxllm.scheduler.plan import PageUpdate, RowPlan, StepPlan
from jaxllm.scheduler.request import Request


class StepDraft:
    """Collects what a step will run, and what is left of its budget.

    budget: tokens the step can still take.
    short: a running request did not find the pages it wanted, so nobody is to be admitted.
    filling: names of the pages that this step fills; the steps after it can find them.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.short = False
        self.filling: set[bytes] = set()
        self._decodes: list[RowPlan] = []
        self._prefills: list[RowPlan] = []
        self._decoding: list[Request] = []
        self._prefilling: list[Request] = []
        self._admitted: list[str] = []
        self._page_updates: list[PageUpdate] = []
        self._preempted: list[str] = []

    def admit(self, request: Request) -> None:
        """Enters a request that was given a row, and the pages it begins with."""
        self._admitted.append(request.request_id)
        self.add_pages(request, 0, request.tables.groups)

    def preempt(self, request: Request) -> None:
        """Enters a request that lost its row."""
        self._preempted.append(request.request_id)
        self.short = True

    def add_pages(self, request: Request, index: int, pages: Sequence[Sequence[int]]) -> None:
        """Enters each group's pages from column `index` on."""
        assert request.row is not None
        for group, added in enumerate(pages):
            if added:
                self._page_updates.append(PageUpdate(request.row, group, index, tuple(added)))

    def add_row(self, request: Request, start: int, num_tokens: int, samples: bool) -> None:
        """Enters a request's part and takes it from the budget."""
        assert request.row is not None
        self.budget -= num_tokens
        row = RowPlan(request.request_id, request.row, start, num_tokens, samples)
        if num_tokens == 1:
            self._decodes.append(row)
            self._decoding.append(request)
        else:
            self._prefills.append(row)
            self._prefilling.append(request)

    def close(self) -> tuple[StepPlan, list[Request]]:
        """The plan, and the request of each of its rows."""
        plan = StepPlan(
            rows=(*self._decodes, *self._prefills),
            admitted=tuple(self._admitted),
            page_updates=tuple(self._page_updates),
            preempted=tuple(self._preempted),
        )
        return plan, self._decoding + self._prefilling
