"""Continuous batching: each step lets computed tokens catch up with known tokens, within a budget.

There are no phases. A request that was just admitted misses its prompt, a running one the token sampled
last, a preempted one all that it had: `schedule` hands the step's budget to what is missing, for running
requests first and then for waiting ones, in the policy's order.
"""

import heapq
import itertools
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.cache.manager import CacheManager, CacheStats, Prefix
from jaxllm.cache.prefix import HashChain
from jaxllm.config import Policy
from jaxllm.scheduler.draft import StepDraft
from jaxllm.scheduler.limits import Limits
from jaxllm.scheduler.plan import RowPlan, StepPlan
from jaxllm.scheduler.queues import FcfsQueue, PriorityQueue, WaitingQueue
from jaxllm.scheduler.request import Request, RequestStatus


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts at one moment.

    waste: share of the slots of held pages in which no token has been put.
    """

    num_waiting: int
    num_running: int
    num_preemptions: int
    waste: float
    cache: CacheStats


class Scheduler:
    """Plans steps for requests.

    Steps may be planned ahead: `schedule` can be called again before `complete` has brought the tokens of the
    step before. A token in flight counts as known, and its row may be planned for the next one.

    What is promised:

    - with nothing in flight, `schedule` finds something to run while requests are unfinished: what could
      never run was refused by `add`, and the first running request may take the pages of all others;
    - requests are admitted strictly in the policy's order: a large one at the head waits until its known
      tokens fit, and nobody overtakes it;
    - a request waits for the next step if this one computes most of what it misses, for another request: it
      finds those pages in the prefix cache then. So `n` samples of a prompt compute it once;
    - requests are preempted from the end of that order (the newest of the lowest priority), only for one
      that is ahead of them, and not to admit somebody. They compute their tokens again when they come back.
    """

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        policy: Policy = "fcfs",
        enable_chunked_prefill: bool = True,
        num_stages: int = 1,
    ) -> None:
        """Makes a scheduler without requests; the limits are explained in `Limits`.

        Raises:
            ValueError: a limit below 1, or an unknown policy.
        """
        self.limits = Limits(
            max_num_seqs, max_num_batched_tokens, max_model_len, enable_chunked_prefill, num_stages
        )
        if policy not in ("fcfs", "priority"):
            raise ValueError(f"policy={policy!r}: must be 'fcfs' or 'priority'")
        self.cache = cache
        self.policy = policy
        self.requests: dict[str, Request] = {}
        """All unfinished requests, by id."""
        self.running: list[Request] = []
        """Those that have a row, in the policy's order."""
        self._waiting = self.no_requests()
        self._free_rows = list(range(max_num_seqs))
        self._in_flight: deque[tuple[StepPlan, list[Request]]] = deque()
        self._num_added = 0
        self._num_preemptions = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def caches(self) -> tuple[CacheManager, ...]:
        """The one that there is."""
        return (self.cache,)

    def cache_stats(self) -> CacheStats:
        """How the pages are used."""
        return self.cache.stats()

    @property
    def num_in_flight(self) -> int:
        """Steps that have been planned and not completed."""
        return len(self._in_flight)

    def stats(self) -> SchedulerStats:
        """Counts as they are now; costs a look at every running request."""
        cache = self.cache.stats()
        unused = sum(self.cache.unused_slots(r.tables, r.num_computed_tokens) for r in self.running)
        slots = cache.num_used * self.cache.page_size
        waste = unused / slots if slots else 0.0
        return SchedulerStats(self.num_waiting, self.num_running, self._num_preemptions, waste, cache)

    # Requests come and go

    def add(self, request: Request) -> None:
        """Puts a new request among the waiting ones.

        Raises:
            ValueError: its id is that of an unfinished request; it has been added before; or it could never
                run: longer than max_model_len, than a step where prompts are not chunked, or than all pages.
        """
        self.check_fits(request)
        request.arrive(self._num_added, id_in_use=request.request_id in self.requests)
        self._num_added += 1
        self.enqueue(request, self.cache.chain(request.cache_salt))

    def enqueue(self, request: Request, chain: HashChain) -> None:
        """Puts a request that has been checked and numbered among the waiting ones.

        Args:
            chain: its own, as far as anybody has made it.
        """
        request.chain, request.tables = chain, self.cache.no_tables()
        self.requests[request.request_id] = request
        self._waiting.push(request)

    def check_fits(self, request: Request) -> None:
        """Raises ValueError if the request could never run; see `Limits.check_fits`."""
        self.limits.check_fits(request, self.cache)

    def finish(self, request_id: str, status: RequestStatus) -> Request | None:
        """Ends a request and frees its row and pages. None if no unfinished request has this id.

        Tokens of it that are still in flight are dropped when they arrive.

        Raises:
            ValueError: the status is not a finished one.
        """
        if not status.is_finished:
            raise ValueError(f"status={status}: must be one of the FINISHED ones")
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        if request.status is RequestStatus.RUNNING:
            del self.running[bisect_left(self.running, self._order(request), key=self._order)]
            self._vacate(request)
        else:
            self._waiting.remove(request)
        request.status = status
        return request

    def abandon(self) -> list[Request]:
        """For when a step has failed: ends what was running, with FINISHED_ERROR, and returns those requests.

        Planned steps and cached pages are forgotten, since nobody knows what was written. Waiting requests
        stay.
        """
        self._in_flight.clear()
        failed = [r for r in self.requests.values() if r.status is RequestStatus.RUNNING or r.num_in_flight]
        for request in failed:
            self.finish(request.request_id, RequestStatus.FINISHED_ERROR)
        self.cache.reset_prefix_cache()
        return failed

    def clear(self) -> None:
        """Forgets every request, plan and page, whatever state they are in. What has been counted stays."""
        self.cache.clear()
        self.requests.clear()
        self.running.clear()
        self._waiting = self.no_requests()
        self._free_rows = list(range(self.limits.max_num_seqs))
        self._in_flight.clear()

    def no_requests(self) -> WaitingQueue:
        """An empty queue of the policy."""
        return FcfsQueue() if self.policy == "fcfs" else PriorityQueue()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages. False, and nothing happens, while requests are running."""
        return self.cache.reset_prefix_cache()

    def _order(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.policy == "priority" else 0, request.arrival)

    def _vacate(self, request: Request) -> None:
        """Takes row and pages from a request that is no longer in `running`."""
        assert request.row is not None
        self.cache.close(request.tables, request.chain, request.token_ids, request.num_computed_tokens)
        heapq.heappush(self._free_rows, request.row)
        request.row, request.tables = None, self.cache.no_tables()

    # Planning a step

    def schedule(self) -> StepPlan:
        """Plans the next step. The plan has no rows if nothing can run before tokens in flight arrive.

        A plan with rows must be dispatched, in the order of planning, and then completed.
        """
        draft = StepDraft(self.limits.max_num_batched_tokens)
        self._continue_running(draft)
        if not draft.short:
            self._admit_waiting(draft)
        plan, requests = draft.close()
        if plan.rows:
            self._in_flight.append((plan, requests))
        return plan

    def _continue_running(self, draft: StepDraft) -> None:
        under_way = self._under_way()
        index, share = 0, -(-len(self.running) // self.limits.num_stages)
        while index < len(self.running) and draft.budget and share:
            request = self.running[index]
            index += 1
            # at every step, so that a prompt's pages can be found as soon as they have been computed
            self.cache.advance(request.tables, request.chain, request.token_ids, request.num_computed_tokens)
            wanted = min(request.num_missing_tokens, draft.budget)
            if wanted and request.request_id not in under_way:
                count = self._make_room(request, wanted, draft)
                draft.short |= count < wanted
                if count:
                    self._plan_row(request, count, draft)
                    share -= 1

    def _under_way(self) -> set[str]:
        """Requests whose next tokens other stages still compute: with them the first stage would wait."""
        others = itertools.islice(reversed(self._in_flight), self.limits.num_stages - 1)
        return {row.request_id for plan, _ in others for row in plan.rows if row.samples}

    def _make_room(self, request: Request, wanted: int, draft: StepDraft) -> int:
        """How many of the wanted tokens there are pages for, after preempting requests behind this one.

        It takes what there is, and preempts only where that is nothing. The last one then waits in its row,
        with its pages: those ahead of it will take them if they must, and if they need not, it has nothing
        to compute again.
        """
        start = request.num_computed_tokens
        if start + wanted <= self.cache.capacity(request.tables.num_columns, 0):
            return wanted
        while True:
            room = self.cache.capacity(request.tables.num_columns, self.cache.pool.num_available) - start
            if room or self.running[-1] is request:
                return min(room, wanted)
            self._preempt(draft)

    def _preempt(self, draft: StepDraft) -> None:
        request = self.running.pop()
        self._vacate(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting.push(request)
        draft.preempt(request)

    def _admit_waiting(self, draft: StepDraft) -> None:
        while self._waiting and self._free_rows and draft.budget:
            request = self._waiting.peek()
            if request.num_in_flight:
                return  # the host cannot send a token that it has not read
            prefix = self._find_prefix(request)
            if self._is_coming(request, prefix, draft):
                return
            count = self._room_to_admit(request, prefix, draft)
            if not count:
                return
            self._waiting.remove(request)
            self._admit(request, prefix, draft)
            self._plan_row(request, count, draft)

    def _find_prefix(self, request: Request) -> Prefix:
        if request.skip_prefix_cache:
            return self.cache.no_prefix()
        return self.cache.find_prefix(request.chain, request.token_ids)

    def _is_coming(self, request: Request, prefix: Prefix, draft: StepDraft) -> bool:
        """Whether this step computes at least half of what a waiting request misses.

        Less would not be worth the step: prompts often share some first tokens of a chat template.
        """
        if request.skip_prefix_cache:
            return False
        coming = self.cache.num_coming(prefix, request.chain, request.token_ids, draft.filling)
        return 0 < len(request.token_ids) - prefix.num_tokens <= 2 * coming

    def _room_to_admit(self, request: Request, prefix: Prefix, draft: StepDraft) -> int:
        """How many tokens of a waiting request can be computed now, or 0 to leave it waiting.

        All tokens it knows must fit, not only this step's. Nobody else is halfway through a prompt then: that
        one would have taken what was left of the budget. So prompts do not push each other out.
        """
        start, known = prefix.num_tokens, len(request.token_ids)
        columns = start // self.cache.page_size
        available = self.cache.pool.num_available - prefix.num_idle
        if self.cache.growth(known, start, columns) > available:
            return 0
        missing = known - start
        count = min(missing, draft.budget, self.cache.capacity(columns, available) - start)
        whole = self.limits.enable_chunked_prefill or request.num_preemptions > 0 or count == missing
        return count if whole else 0

    def _admit(self, request: Request, prefix: Prefix, draft: StepDraft) -> None:
        request.tables = self.cache.open(prefix)
        request.row = heapq.heappop(self._free_rows)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = prefix.num_tokens
        if request.num_preemptions == 0:
            request.num_cached_tokens = prefix.num_tokens
            if not request.skip_prefix_cache:
                self.cache.count_query(len(request.prompt_token_ids), prefix)
        insort(self.running, request, key=self._order)
        draft.admit(request)

    def _plan_row(self, request: Request, count: int, draft: StepDraft) -> None:
        """Enters a running request's next `count` tokens, for which there is room."""
        start, columns, size = request.num_computed_tokens, request.tables.num_columns, self.cache.page_size
        end = start + count
        if end // size > start // size:  # most steps of one token neither fill a page nor need one
            draft.filling.update(self.cache.names(request.chain, request.token_ids, start, count))
        if end > columns * size:
            draft.add_pages(request, columns, self.cache.extend(request.tables, end))
        request.num_computed_tokens = end
        samples = end == request.num_known_tokens
        request.num_in_flight += samples
        draft.add_row(request, start, count, samples)

    # Its tokens arrive

    def complete(self, plan: StepPlan, tokens: Sequence[Sequence[int]]) -> list[tuple[Request, list[int]]]:
        """Takes the tokens of a step that has run.

        Args:
            plan: the oldest plan not yet completed.
            tokens: for each of its rows the tokens sampled; none where the row did not sample.

        Returns the requests that still live, in the order of the rows, with their new tokens (none where the
        row did not sample). One that has now got max_tokens comes back finished, with FINISHED_LENGTH; those
        finished since the step was planned are left out; one preempted since gets its token while it waits.

        Raises:
            ValueError: another plan is due, or the tokens do not match its rows.
        """
        if not plan.rows:
            return []
        if not self._in_flight or self._in_flight[0][0] is not plan:
            raise ValueError(
                "complete: not the oldest plan in flight; complete plans in the order they were made"
            )
        if [bool(new) for new in tokens] != [row.samples for row in plan.rows]:
            raise ValueError("complete: tokens must be given for exactly the rows that sample")
        _, requests = self._in_flight.popleft()
        done = []
        for row, request, sampled in zip(plan.rows, requests, tokens, strict=True):
            if not request.status.is_finished:
                done.append((request, self._take_tokens(request, row, sampled)))
        return done

    def _take_tokens(self, request: Request, row: RowPlan, sampled: Sequence[int]) -> list[int]:
        new = list(map(int, sampled[: request.max_tokens - len(request.output_token_ids)]))
        request.num_in_flight -= row.samples
        request.output_token_ids.extend(new)
        request.token_ids.extend(new)
        if len(request.output_token_ids) == request.max_tokens:
            self.finish(request.request_id, RequestStatus.FINISHED_LENGTH)
        return new
