"""Several schedulers whose steps run as one: each data group has rows, pages and a prefix cache."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxllm.cache.manager import CacheManager, CacheStats
from jaxllm.scheduler.limits import Limits
from jaxllm.scheduler.plan import StepPlan
from jaxllm.scheduler.request import Request, RequestStatus
from jaxllm.scheduler.routing import Candidate, choose_replica
from jaxllm.scheduler.scheduler import Scheduler, SchedulerStats


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request has gone.

    names: of the pages that its prompt fills there.
    """

    group: int
    names: tuple[bytes, ...]


class GroupedScheduler:
    """Has the methods of `Scheduler` that an engine calls, and shares requests out over data groups.

    Requests wait in one queue, in the policy's order, until a group has rows for the first of them; see
    `choose_replica` for which one gets it. There it stays, preempted or not, until it has ended.

    Args:
        groups: of the same sizes, without requests.
    """

    def __init__(self, groups: Sequence[Scheduler]) -> None:
        self.groups = tuple(groups)
        self._rows = groups[0].limits.max_num_seqs
        self._num_added = 0
        self._forget_all()

    def _forget_all(self) -> None:
        self._waiting = self.groups[0].no_requests()
        self._queued: dict[str, Request] = {}
        """Those that wait for a group, by id."""
        self._places: dict[str, Place] = {}
        """Of all others."""
        self._coming: list[Counter[bytes]] = [Counter() for _ in self.groups]
        """For each group the names of the pages that its requests' prompts fill."""

    @property
    def limits(self) -> Limits:
        """Those of a group, but for the rows, which are those of all."""
        return replace(self.groups[0].limits, max_num_seqs=self._rows * len(self.groups))

    @property
    def running(self) -> list[Request]:
        """Requests that have a row, group by group."""
        return [request for group in self.groups for request in group.running]

    @property
    def num_running(self) -> int:
        return sum(group.num_running for group in self.groups)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(group.num_waiting for group in self.groups)

    @property
    def caches(self) -> tuple[CacheManager, ...]:
        """Each group's."""
        return tuple(group.cache for group in self.groups)

    def cache_stats(self) -> CacheStats:
        """How the pages of all groups are used."""
        return CacheStats.together(cache.stats() for cache in self.caches)

    def stats(self) -> SchedulerStats:
        """Counts as they are now; costs a look at every running request."""
        parts = [group.stats() for group in self.groups]
        cache = CacheStats.together(part.cache for part in parts)
        unused = sum(part.waste * part.cache.num_used for part in parts)
        return SchedulerStats(
            self.num_waiting,
            self.num_running,
            sum(part.num_preemptions for part in parts),
            unused / cache.num_used if cache.num_used else 0.0,
            cache,
        )

    # Requests come and go

    def add(self, request: Request) -> None:
        """Puts a new request among the waiting ones.

        Raises:
            ValueError: as `Scheduler.add`.
        """
        self.check_fits(request)
        in_use = request.request_id in self._queued or request.request_id in self._places
        request.arrive(self._num_added, id_in_use=in_use)
        self._num_added += 1
        self._queued[request.request_id] = request
        self._waiting.push(request)

    def check_fits(self, request: Request) -> None:
        """Raises ValueError if the request could never run in a group; see `Limits.check_fits`."""
        self.groups[0].check_fits(request)

    def finish(self, request_id: str, status: RequestStatus) -> Request | None:
        """Ends a request; see `Scheduler.finish`."""
        if not status.is_finished:
            raise ValueError(f"status={status}: must be one of the FINISHED ones")
        if (request := self._queued.pop(request_id, None)) is not None:
            self._waiting.remove(request)
            request.status = status
            return request
        place = self._places.get(request_id)
        if place is None:
            return None
        self._leave(request_id)
        return self.groups[place.group].finish(request_id, status)

    def abandon(self) -> list[Request]:
        """For when a step has failed: ends what was running in any group; see `Scheduler.abandon`."""
        failed = [request for group in self.groups for request in group.abandon()]
        for request in failed:
            self._leave(request.request_id)
        return failed

    def clear(self) -> None:
        """Forgets every request, plan and page, whatever state they are in. What has been counted stays."""
        for group in self.groups:
            group.clear()
        self._forget_all()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages. False, and nothing happens, while requests are running in any group."""
        if self.num_running:
            return False
        done = [group.reset_prefix_cache() for group in self.groups]
        return all(done)

    # Steps

    def schedule(self) -> StepPlan:
        """Plans the next step of every group; see `Scheduler.schedule`."""
        self._assign()
        return StepPlan.join([group.schedule() for group in self.groups], self._rows)

    def complete(self, plan: StepPlan, tokens: Sequence[Sequence[int]]) -> list[tuple[Request, list[int]]]:
        """Takes the tokens of a step that has run; see `Scheduler.complete`."""
        done: list[tuple[Request, list[int]]] = []
        first = 0
        for group, part in zip(self.groups, plan.parts, strict=True):
            end = first + len(part.rows)
            done += group.complete(part, tokens[first:end])
            first = end
        for request, _ in done:
            if request.status.is_finished:
                self._leave(request.request_id)
        return done

    def _assign(self) -> None:
        """Gives waiting requests to groups as long as one of them has rows for the first."""
        while self._waiting:
            loads = [group.num_running + group.num_waiting for group in self.groups]
            free = [index for index, load in enumerate(loads) if load < self._rows]
            if not free:
                return
            request = self._waiting.peek()
            self._waiting.remove(request)
            del self._queued[request.request_id]
            chain = self.groups[0].cache.chain(request.cache_salt)
            prompt = request.prompt_token_ids
            names = tuple(self.groups[0].cache.names(chain, prompt, 0, len(prompt)))
            candidates = []
            for index in free:
                found, cache = 0, self.groups[index].cache
                if not request.skip_prefix_cache:
                    prefix = cache.find_prefix(chain, prompt)
                    found = prefix.num_tokens + cache.num_coming(prefix, chain, prompt, self._coming[index])
                candidates.append(Candidate(loads[index], found))
            best = free[choose_replica(candidates, len(prompt), self._rows)]
            self._places[request.request_id] = Place(best, names)
            self._coming[best].update(names)
            self.groups[best].enqueue(request, chain)

    def _leave(self, request_id: str) -> None:
        place = self._places.pop(request_id)
        coming = self._coming[place.group]
        for name in place.names:
            coming[name] -= 1
            if not coming[name]:
                del coming[name]
