"""Several replicas of the engine's core behind one queue: each request runs on one of them."""

import itertools
import logging
import random
from bisect import insort
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from jaxllm.engine.core import EngineFailedError
from jaxllm.engine.inputs import EngineInput
from jaxllm.engine.metrics import EngineState, Metrics
from jaxllm.engine.outputs import FinishReason, RequestOutput, join
from jaxllm.engine.replica import Job, Replica
from jaxllm.engine.replica_core import ReplicaCore
from jaxllm.engine.restarts import RestartBudget
from jaxllm.engine.sample import Sample
from jaxllm.sampling.params import RequestOutputKind
from jaxllm.scheduler.routing import Candidate, choose_replica

logger = logging.getLogger(__name__)

FRONT = "front"
"""What the queue is called where replicas are numbered."""
MOST_MOVES = 2
"""Times that a request goes to another replica because a step failed: where three replicas have failed, it is
likely to be the reason."""
POLL_SECONDS = 0.05
"""How long a step waits at most while all replicas start over, so that its caller can do other things."""


class Replicas:
    """Has the methods of `EngineCore` that an engine calls, and shares requests out over several cores.

    Requests wait in one queue, in the policy's order, until a replica has rows for the first of them; see
    `choose_replica` for which one gets it. Each replica runs its steps in a thread of its own, so that none
    waits for another's.

    If a step fails, its requests run again on another replica, after the tokens that they have given out.
    A replica that cannot go on starts over in its thread, while the others serve; while there are none,
    requests wait. One that has failed too often stays out; once all have, so has this failed.

    Args:
        cores: of the same model and the same sizes.
        seed: that requests' seeds are drawn with, where they bring none.
    """

    def __init__(self, cores: Sequence[ReplicaCore], seed: int) -> None:
        self.cores = tuple(cores)
        self.vocabulary = cores[0].vocabulary
        self.last_error: Exception | None = None
        """Why requests have ended with errors, or replicas have failed, most recently."""
        self.arrivals = Metrics()
        """Starts requests' records; what becomes of them, the replicas count."""
        self._ended = Metrics()
        """Counts those that end while no replica has them."""
        self._replicas = [Replica(index, core) for index, core in enumerate(cores)]
        self._rows = cores[0].scheduler.limits.max_num_seqs
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._jobs: dict[str, Job] = {}
        """All requests whose last output has not been given out."""
        self._names: set[str] = set()
        """Of their samples, which no two requests may share."""
        self._queue: list[Job] = []
        self._outputs: list[RequestOutput] = []
        """What the next step gives out."""
        self._threads = ThreadPoolExecutor(len(cores), thread_name_prefix="jaxllm-replica")

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._jobs)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not given out their last output."""
        return len(self._jobs)

    @property
    def num_waiting(self) -> int:
        """Outputs wanted by requests that no replica has rows for."""
        return sum(len(job.samples) for job in self._queue)

    @property
    def failure(self) -> Exception | None:
        """Why nothing can run any more, if that is so."""
        return self.last_error if all(replica.is_out for replica in self._replicas) else None

    def __contains__(self, request_id: object) -> bool:
        """Whether an unfinished request has this id."""
        return request_id in self._jobs

    @property
    def metrics(self) -> Metrics:
        """What all replicas have counted until now."""
        return Metrics.together([*(core.metrics for core in self.cores), self._ended])

    def get_metrics(self) -> dict[str, float]:
        """As `EngineCore.get_metrics`, of all together; and of how many `replicas` some have failed.

        Of those that have, some are given up; the others are about to come back.
        """
        caches = [core.scheduler.cache.stats() for core in self.cores]
        waiting = sum(core.scheduler.num_waiting for core in self.cores)
        inboxes = sum(len(job.samples) for replica in self._replicas for job in list(replica.inbox))
        state = EngineState(
            requests_running=sum(core.scheduler.num_running for core in self.cores),
            requests_waiting=waiting + inboxes + self.num_waiting,
            pages_used=sum(cache.num_used for cache in caches),
            num_pages=sum(cache.num_pages for cache in caches),
            prefix_cache_queries=sum(cache.prefix_queries for cache in caches),
            prefix_cache_hits=sum(cache.prefix_hits for cache in caches),
        )
        failed = sum(not replica.is_alive for replica in self._replicas)
        return self.metrics.snapshot(state) | {
            "replicas": float(len(self._replicas)),
            "replicas_failed": float(failed),
            "replicas_given_up": float(sum(replica.is_out for replica in self._replicas)),
        }

    def figures(self) -> dict[str, dict[str, float]]:
        """What each replica has counted, by its number; and of requests that no replica has, as "front"."""
        found = {
            str(replica.index): replica.core.get_metrics() | {"replica_given_up": float(replica.is_out)}
            for replica in self._replicas
        }
        return found | {FRONT: self._ended.snapshot(EngineState(0, self.num_waiting, 0, 0, 0, 0))}

    # Requests come and go

    def add(self, request_id: str, input: EngineInput) -> None:
        """Takes a request; see `EngineCore.add`.

        Raises:
            ValueError: the id is in use, the request can never fit, or it needs more than a row has room for.
        """
        if request_id in self._jobs:
            raise ValueError(f"request_id={request_id!r}: an unfinished request has this id; choose another")
        core, seed = self.cores[0], input.params.seed
        drawn = self._random.getrandbits(64) if seed is None else seed
        samples = core.make(request_id, input, drawn)
        names = frozenset(sample.request.request_id for sample in samples)
        for name in names & self._names:
            raise ValueError(f"request_id={name!r}: an unfinished request has this id; choose another")
        self._names |= names
        samples[0].assembler.metrics = self.arrivals.request_arrived(len(input.prompt_token_ids))
        priority = input.priority if core.scheduler.policy == "priority" else 0
        cache, prompt = core.scheduler.cache, input.prompt_token_ids
        chain = cache.chain(input.cache_salt)
        cache.names(chain, prompt, 0, len(prompt))  # so that the chain has them
        job = self._jobs[request_id] = Job(samples, names, (priority, next(self._numbers)), chain)
        self._enqueue(job)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> RequestOutput | None:
        """Ends a request and gives what it has not given out yet; None if no unfinished one has this id."""
        job = self._jobs.get(request_id)
        if job is None:
            return None
        if job.place is not None:
            self._settle(job.place)  # which may end the request, or send it elsewhere
        if job in self._queue:
            self._queue.remove(job)
        if (replica := job.place) is not None:
            replica.empty_inbox()
            self._receive(replica, [output] if (output := replica.core.abort(request_id, reason)) else [])
        elif request_id in self._jobs and not job.assembler.finished:
            self._end(job, reason)
        return self._take_outputs_of(job)

    def abort_all(self, reason: FinishReason = "abort") -> list[RequestOutput]:
        """Ends every request, and gives their last outputs."""
        outputs = [self.abort(request_id, reason) for request_id in list(self._jobs)]
        return [output for output in outputs if output is not None]

    def _take_outputs_of(self, job: Job) -> RequestOutput | None:
        """What is there to be given out of a request that has ended, as one output."""
        request_id = job.assembler.request_id
        own = [output for output in self._outputs if output.request_id == request_id]
        self._outputs = [output for output in self._outputs if output.request_id != request_id]
        self._forget(request_id)
        found = None
        delta = job.assembler.input.params.output_kind is RequestOutputKind.DELTA
        for output in own:
            found = join(found, output) if delta and found is not None else output
        return found

    # Steps

    def step(self) -> list[RequestOutput]:
        """Keeps all replicas busy until one of them has run a step, and gives out what is new.

        Raises:
            EngineFailedError: every replica has failed; nothing can run any more.
        """
        if self.failure is not None:
            raise EngineFailedError("all replicas have failed; make another engine") from self.failure
        self._begin_steps()
        steps: list[Future[Any]] = [r.step for r in self._replicas if r.step is not None]
        restarts = [r.restart for r in self._replicas if r.restart is not None and r.is_restarting]
        if (steps or restarts) and not self._outputs:
            wait(steps + restarts, None if steps else POLL_SECONDS, FIRST_COMPLETED)
        for replica in self._replicas:
            if replica.step is not None and replica.step.done():
                self._settle(replica)
        self._begin_steps()
        outputs, self._outputs = self._outputs, []
        for output in outputs:
            if output.finished:
                self._forget(output.request_id)
        return outputs

    def _forget(self, request_id: str) -> None:
        if (job := self._jobs.pop(request_id, None)) is not None:
            self._names -= job.names

    def restart(self) -> None:
        """Starts all replicas over, those that have been taken out, too; requests get no last output.

        Raises:
            Exception: not one of them can. It may be tried again.
        """
        self._stop_restarts()
        wait([replica.step for replica in self._replicas if replica.step is not None])
        for job in self._jobs.values():
            known = any(job.assembler.request_id in core for core in self.cores)
            if not known and not job.assembler.finished:
                self._count_end(job, "error")
        for kept in (self._jobs, self._names, self._queue, self._outputs):
            kept.clear()
        self._replicas = [Replica(old.index, old.core, old.restarts) for old in self._replicas]
        for core in self.cores:
            core.displaced.clear()
            try:
                core.restart()
            except Exception as error:
                logger.exception("a replica cannot start over")
                self.last_error = core.failure = error
        if not any(replica.is_alive for replica in self._replicas):
            for replica in self._replicas:
                replica.is_out = True
            assert self.last_error is not None
            raise self.last_error
        self._begin_restarts()

    def limit_restarts(self, most: int, seconds: float) -> None:
        """How often each replica may start over by itself within so many seconds; see `RestartBudget`."""
        for replica in self._replicas:
            replica.restarts = RestartBudget(most, seconds)

    def drain(self) -> None:
        """Waits for the steps in flight, which work for requests that have all ended.

        A replica that is about to start over does so with the next step.
        """
        for replica in self._replicas:
            self._settle(replica)
        self._stop_restarts()
        for replica in self._replicas:
            if replica.is_alive:
                replica.core.drain()

    def close(self) -> None:
        """Ends the threads, once their steps are done."""
        self._stop_restarts()
        self._threads.shutdown()

    def _begin_restarts(self) -> None:
        """Has replicas that have failed start over, while others serve."""
        for replica in self._replicas:
            if replica.wants_restart:
                for job in self._jobs.values():
                    if job.avoid is replica:
                        job.avoid = None  # it comes back as new, maybe before others do
                replica.stop.clear()
                replica.restart = self._threads.submit(replica.start_over)

    def _stop_restarts(self) -> None:
        """Ends the pauses between restarts, and waits for those that have begun."""
        for replica in self._replicas:
            replica.stop.set()
        wait([replica.restart for replica in self._replicas if replica.restart is not None])

    def _begin_steps(self) -> None:
        self._begin_restarts()
        self._assign()
        for replica in self._replicas:
            if replica.step is None and replica.is_alive:
                replica.empty_inbox()
                if replica.core.has_unfinished:
                    replica.step = self._threads.submit(replica.core.step)

    def _assign(self) -> None:
        """Gives requests to replicas, in order; the first that none has rows for holds up those behind it.

        One that waits for a replica to come back does not: others may go where it has failed.
        """
        passed = 0
        while passed < len(self._queue):
            job = self._queue[passed]
            others = [r for r in self._replicas if r is not job.avoid and not r.is_out]
            if not others:
                del self._queue[passed]
                self._end(job, "error")
                continue
            alive = [replica for replica in others if replica.is_alive]
            if not alive:
                passed += 1
                continue
            wanted = len(job.samples)
            free = [r for r in alive if r.load + wanted <= self._rows or not r.load]
            if not free:
                return
            prompt = job.samples[0].request
            skip = prompt.skip_prefix_cache
            candidates = [Candidate(r.load, 0 if skip else r.num_found(job)) for r in free]
            best = choose_replica(candidates, len(prompt.prompt_token_ids), self._rows)
            del self._queue[passed]
            free[best].place(job)

    def _settle(self, replica: Replica) -> None:
        """Waits for a replica's step, if it runs one, and takes what came of it."""
        step, replica.step = replica.step, None
        if step is None:
            return
        try:
            self._receive(replica, step.result())
        except Exception as error:  # the core ends failed steps itself: this one could not be planned
            replica.core.failure = error
        core = replica.core
        self.last_error = core.failure or core.last_error or self.last_error
        if core.failure is not None:
            logger.error("replica %d has failed, and starts over: %s", replica.index, core.failure)
            core.release_all()
            for job in replica.inbox:
                replica.forget(job)
                self._enqueue(job)
            replica.inbox.clear()
        for assembler, samples in core.displaced:
            self._move(self._jobs[assembler.request_id], samples)
        core.displaced.clear()
        self._begin_restarts()

    def _receive(self, replica: Replica, outputs: Sequence[RequestOutput]) -> None:
        self._outputs += outputs
        for output in outputs:
            if output.finished:
                replica.forget(self._jobs[output.request_id])

    def _move(self, job: Job, samples: list[Sample]) -> None:
        """Lets a request that a step has failed with go on elsewhere, unless that has happened too often."""
        replica = job.place
        assert replica is not None, "only a replica displaces requests"
        replica.forget(job)
        job.avoid, job.num_moves = replica, job.num_moves + 1
        if job.num_moves > MOST_MOVES or not samples:
            self._end(job, "error")
        else:
            job.samples = samples
            self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        insort(self._queue, job, key=lambda waiting: waiting.order)

    def _end(self, job: Job, reason: FinishReason) -> None:
        """Ends a request that no replica has."""
        job.assembler.abort(reason)
        if (output := job.assembler.take()) is not None:
            self._outputs.append(output)
        self._count_end(job, reason)

    def _count_end(self, job: Job, reason: FinishReason) -> None:
        job.count(self._ended)
        if job.assembler.metrics is not None:
            self._ended.request_finished(job.assembler.metrics, reason)
