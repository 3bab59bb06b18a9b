"""One of several replicas, and the requests that it has been given."""

import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

from jaxllm.cache.prefix import HashChain
from jaxllm.engine.assembler import OutputAssembler
from jaxllm.engine.metrics import Metrics
from jaxllm.engine.outputs import RequestOutput
from jaxllm.engine.replica_core import ReplicaCore
from jaxllm.engine.restarts import RestartBudget
from jaxllm.engine.sample import Sample


@dataclass(eq=False)
class Job:
    """A request, where it waits or runs."""

    samples: list[Sample]
    """All, or after a step has failed those that had not ended."""
    names: frozenset[str]
    """Of all samples."""
    order: tuple[int, int]
    """Priority, and when it came."""
    chain: HashChain
    """Names of the prompt's full pages."""
    place: "Replica | None" = None
    """The replica that has it; None while it waits."""
    avoid: "Replica | None" = None
    """The replica that failed with it last."""
    num_moves: int = 0
    counted: bool = False
    """Whether it is in the figures of some replica, or of those that none has had."""

    def count(self, metrics: Metrics) -> None:
        """Counts it among those that have arrived, unless that has been done."""
        if self.assembler.metrics is not None and not self.counted:
            metrics.request_taken(self.assembler.metrics)
            self.counted = True

    @property
    def assembler(self) -> OutputAssembler:
        """What its outputs are put together by."""
        return self.samples[0].assembler


@dataclass(eq=False)
class Replica:
    """A core, and what it has been given."""

    index: int
    core: ReplicaCore
    restarts: RestartBudget = field(default_factory=RestartBudget)
    inbox: list[Job] = field(default_factory=list)
    """Requests that it takes before its next step."""
    load: int = 0
    """Outputs that it makes or is about to."""
    coming: Counter[bytes] = field(default_factory=Counter)
    """Names of the pages that its requests' prompts fill."""
    step: "Future[list[RequestOutput]] | None" = None
    """The step that its thread runs; meanwhile nobody else may change the core."""
    restart: "Future[None] | None" = None
    """Where its thread starts the core over, or has; meanwhile nobody else may change the core."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set to keep it from starting over."""
    is_out: bool = False
    """Whether it has failed too often, and stays out until all replicas start over."""

    @property
    def is_alive(self) -> bool:
        """Whether it can be given requests."""
        return self.core.failure is None and not self.is_restarting

    @property
    def is_restarting(self) -> bool:
        """Whether its thread starts the core over."""
        return self.restart is not None and not self.restart.done()

    @property
    def wants_restart(self) -> bool:
        """Whether it has failed, the step that did has been settled, and nothing has been done about it.

        A core knows of its failure before its step has ended: to start over then would lose what waits in it.
        """
        failed = self.core.failure is not None and self.step is None
        return failed and not self.is_restarting and not self.is_out

    def start_over(self) -> None:
        """Restarts the core after it has failed, as often as it may, with pauses between; in its thread."""
        error = self.core.failure
        assert error is not None, "only what has failed starts over"
        name = f"replica {self.index}"
        self.core.failure = self.restarts.start_over(name, self.core.restart, error, self.stop)
        self.is_out = self.core.failure is not None and not self.stop.is_set()

    def place(self, job: Job) -> None:
        """Gives it a request."""
        self.inbox.append(job)
        self._hold(job, 1)
        job.place = self

    def forget(self, job: Job) -> None:
        """The request has ended, or has gone elsewhere."""
        self._hold(job, -1)
        job.place = None

    def _hold(self, job: Job, count: int) -> None:
        self.load += count * len(job.samples)
        for name in job.chain.digests:
            self.coming[name] += count
            if not self.coming[name]:
                del self.coming[name]

    def empty_inbox(self) -> None:
        """Hands the core what has come for it. Not while it runs a step."""
        for job in self.inbox:
            self.core.adopt(job.samples)
            job.count(self.core.metrics)
        self.inbox.clear()

    def num_found(self, job: Job) -> int:
        """Leading tokens of a prompt that the cache has, or will have; may be asked while a step runs."""
        prompt, cache = job.samples[0].request.prompt_token_ids, self.core.scheduler.cache
        prefix = cache.find_prefix(job.chain, prompt)
        return prefix.num_tokens + cache.num_coming(prefix, job.chain, prompt, self.coming)
