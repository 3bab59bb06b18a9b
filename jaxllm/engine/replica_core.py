"""An engine core among others: requests come to it ready made, and leave it when a step fails."""

import dataclasses
import logging

from jaxllm.engine.assembler import OutputAssembler
from jaxllm.engine.constraint import Constraint
from jaxllm.engine.core import MOST_FAILURES, EngineCore
from jaxllm.engine.outputs import RequestOutput
from jaxllm.engine.sample import Sample
from jaxllm.scheduler.request import RequestStatus
from jaxllm.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

_ENDED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH, RequestStatus.FINISHED_ABORTED)


class ReplicaCore(EngineCore):
    """What `EngineCore` is, but for what becomes of requests when a step fails.

    Attributes:
        displaced: requests that a failed step has left without a place, and their samples that have not
            ended. Each goes on after the tokens that have been given out, wherever it is adopted.
    """

    displaced: list[tuple[OutputAssembler, list[Sample]]]
    scheduler: Scheduler  # pyright: ignore[reportIncompatibleVariableOverride]  # replicas have no data groups

    @classmethod
    def of(cls, core: EngineCore, *, seed: int) -> "ReplicaCore":
        """One with the runner and the scheduler of a core that has had no requests yet."""
        made = cls(core.runner, core.scheduler, core.vocabulary, core.balancer, depth=core.depth, seed=seed)
        made.displaced = []
        return made

    def release_all(self) -> None:
        """Displaces every request, after the core has failed."""
        self._in_flight.clear()
        for request_id in list(self.unfinished):
            self._displace(request_id)

    def _recover(self, error: Exception) -> list[RequestOutput]:
        """Displaces the requests that were running, and starts over with empty pages.

        Where the device takes none this has failed, and yet gives out what the step had read before. So it
        has where weights are to be loaded again: that takes long, and others serve meanwhile.
        """
        logger.error("a step of a replica failed; the requests in it go elsewhere", exc_info=error)
        self.last_error = error
        self._failures_in_a_row += 1
        self._in_flight.clear()
        failed = {
            self.unfinished.samples[r.request_id].assembler.request_id for r in self.scheduler.abandon()
        }
        for request_id in failed:
            self._displace(request_id)
        self.balancer.abandon_round()
        if self._failures_in_a_row == MOST_FAILURES or not self.runner.has_weights():
            self.failure = error
        else:
            try:
                self.runner.reset()
            except Exception as again:
                self.failure = again
        return []

    def _displace(self, request_id: str) -> None:
        samples = self.unfinished.remove(request_id)
        ongoing = [sample for sample in samples if sample.request.status not in _ENDED]
        for sample in samples:
            self.scheduler.finish(sample.request.request_id, RequestStatus.FINISHED_ERROR)
        self.displaced.append((samples[0].assembler, [self._continued(sample) for sample in ongoing]))

    def _continued(self, sample: Sample) -> Sample:
        """The sample with a request that begins after the tokens that its outputs have; others come again.

        They come out the same, since randomness goes by seed and position.
        """
        assembler = sample.assembler
        sample.request = dataclasses.replace(sample.request)
        tokens = assembler.token_ids(sample.index)
        sample.request.output_token_ids.extend(tokens)
        sample.request.token_ids.extend(tokens)
        sample.next_scored = assembler.num_scored
        if sample.constraint is not None:
            sample.constraint = Constraint(assembler.input, self.runner.lowering.sampler.vocab_size)
            sample.constraint.accept(tokens)
        return sample
