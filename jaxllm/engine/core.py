"""The step loop: plans go to the device, tokens come back, outputs go out."""

import logging
import random
from collections import deque
from collections.abc import Sequence

from jaxllm.engine.assembler import OutputAssembler
from jaxllm.engine.constraint import Masks
from jaxllm.engine.expert_balancer import ExpertBalancer
from jaxllm.engine.in_flight import InFlight, NewTokens, num_needed
from jaxllm.engine.inputs import EngineInput
from jaxllm.engine.metrics import EngineState, Metrics
from jaxllm.engine.outputs import FinishReason, RequestOutput
from jaxllm.engine.sample import HeldRow, Sample, held_rows, make_samples, prompts_to_score
from jaxllm.engine.step_clock import StepClock
from jaxllm.engine.step_logprobs import StepLogprobs
from jaxllm.engine.unfinished import Unfinished
from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.runner.runner import Admission, Runner
from jaxllm.runner.stage import RowMasks
from jaxllm.sampling.settings import row_settings
from jaxllm.sampling.state import RowSettings
from jaxllm.scheduler.grouped import GroupedScheduler
from jaxllm.scheduler.plan import RowPlan, StepPlan
from jaxllm.scheduler.request import RequestStatus
from jaxllm.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

_STATUS: dict[FinishReason, RequestStatus] = {
    "stop": RequestStatus.FINISHED_STOPPED,
    "length": RequestStatus.FINISHED_LENGTH,
    "abort": RequestStatus.FINISHED_ABORTED,
    "error": RequestStatus.FINISHED_ERROR,
}
MOST_FAILURES = 3
"""Steps that may fail in a row: the first may have been a request's fault, so many are the engine's."""


class EngineFailedError(RuntimeError):
    """Steps fail again and again; the engine has ended all requests and takes no more."""


class RequestFailedError(RuntimeError):
    """A request ended with an error that was not the caller's."""


class EngineCore:
    """Requests in, outputs out, one step at a time.

    With `depth` 1 the host plans and dispatches a step before it reads the one before; with depth 0 it reads
    each step at once. The tokens are the same.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler | GroupedScheduler,
        vocabulary: Vocabulary | None,
        balancer: ExpertBalancer,
        *,
        depth: int,
        seed: int,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.metrics = Metrics()
        self.vocabulary = vocabulary
        self.balancer = balancer
        self.depth = depth
        self._random = random.Random(seed)
        self.unfinished = Unfinished()
        self._in_flight: deque[InFlight] = deque()
        self._masks = Masks(runner.lowering.sampler.vocab_size)
        self._clock = StepClock()
        self._failures_in_a_row = 0
        self.last_error: Exception | None = None
        """Why requests have ended with errors, most recently."""
        self.failure: Exception | None = None
        """Why the engine has failed, if it has."""

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.unfinished)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not given out their last output."""
        return len(self.unfinished)

    def __contains__(self, request_id: object) -> bool:
        """Whether an unfinished request has this id."""
        return request_id in self.unfinished

    def get_metrics(self) -> dict[str, float]:
        """What has been counted, and how things stand; see `Metrics.snapshot`."""
        cache = self.scheduler.cache_stats()
        state = EngineState(
            requests_running=self.scheduler.num_running,
            requests_waiting=self.scheduler.num_waiting,
            pages_used=cache.num_used,
            num_pages=cache.num_pages,
            prefix_cache_queries=cache.prefix_queries,
            prefix_cache_hits=cache.prefix_hits,
        )
        return self.metrics.snapshot(state)

    def add(self, request_id: str, input: EngineInput) -> None:
        """Takes a request, all of its `n` samples or none.

        Raises:
            ValueError: the id is in use, the request can never fit, or it needs more than a row has room for.
        """
        if request_id in self.unfinished:
            raise ValueError(f"request_id={request_id!r}: an unfinished request has this id; choose another")
        seed = self._random.getrandbits(64) if input.params.seed is None else input.params.seed
        samples = self.make(request_id, input, seed)
        self.adopt(samples)
        samples[0].assembler.metrics = self.metrics.request_arrived(len(input.prompt_token_ids))

    def make(self, request_id: str, input: EngineInput, seed: int) -> list[Sample]:
        """A request's samples, for `adopt` of this core or of another like it.

        Raises:
            ValueError: the request can never fit, or needs more than a row has room for.
        """
        assembler = OutputAssembler(request_id, input, self.vocabulary)
        samples = make_samples(assembler, seed, self.runner.lowering.sampler.vocab_size)
        self._settings(samples[0])  # the samples are alike: what refuses one refuses the first
        self.scheduler.check_fits(samples[0].request)
        return samples

    def adopt(self, samples: Sequence[Sample]) -> None:
        """Takes a request that `make` made, all of its samples or none.

        Raises:
            ValueError: an unfinished sample of another request has the id of one of these.
        """
        self.unfinished.add(samples)
        try:
            for sample in samples:
                self.scheduler.add(sample.request)
        except Exception:
            self.abort(samples[0].assembler.request_id, "error")
            raise

    def abort(self, request_id: str, reason: FinishReason = "abort") -> RequestOutput | None:
        """Ends a request and gives its last output; None if no unfinished request has this id."""
        samples = self.unfinished.get(request_id)
        if not samples:
            return None
        samples[0].assembler.abort(reason)
        for sample in samples:
            self.scheduler.finish(sample.request.request_id, _STATUS[reason])
        return self._take(samples[0].assembler)

    def step(self) -> list[RequestOutput]:
        """Dispatches a step if one can run, reads the oldest if it is due, and gives out what is new.

        If the step fails, its requests end with errors, and those that wait go on with empty pages.

        Raises:
            EngineFailedError: several steps in a row have failed; nothing can run any more.
        """
        if self.failure is not None:
            raise EngineFailedError("the engine has failed; call restart()") from self.failure
        self._clock.begin(busy=self._is_busy())
        plan = self.scheduler.schedule()
        self._clock.scheduled(len(plan.rows), plan.num_tokens)
        for request_id in plan.preempted:
            record = self.unfinished.samples[request_id].assembler.metrics
            assert record is not None
            self.metrics.request_preempted(record)
        outputs: list[RequestOutput] = []
        try:
            self._run(plan, outputs)
            self._failures_in_a_row = 0
        except Exception as error:
            outputs += self._recover(error)
        self.metrics.step_done(self._clock.end(idle=not self.unfinished))
        return outputs

    def _is_busy(self) -> bool:
        """Whether the device still works on the step that it was given last."""
        return bool(self._in_flight) and not self._in_flight[-1].step.is_done()

    def _run(self, plan: StepPlan, outputs: list[RequestOutput]) -> None:
        if plan.rows:
            self.balancer.advance()
            self._dispatch(plan, outputs)
        if self._in_flight and (not plan.rows or len(self._in_flight) > self.depth):
            self._give_out(*self._read(self._in_flight.popleft()), outputs)

    def _recover(self, error: Exception) -> list[RequestOutput]:
        """Ends the requests that were running, and starts over with empty pages: theirs may hold anything."""
        logger.error("a step failed; the requests in it end with errors", exc_info=error)
        self.last_error = error
        self._failures_in_a_row += 1
        if self._failures_in_a_row == MOST_FAILURES:
            self.failure = error
            return self.abort_all("error")
        self._in_flight.clear()
        abandoned = self.scheduler.abandon()
        failed = {self.unfinished.samples[r.request_id].assembler.request_id for r in abandoned}
        outputs = list(filter(None, [self.abort(request_id, "error") for request_id in failed]))
        self.balancer.abandon_round()
        try:
            self.runner.reset()
        except Exception as again:
            self.failure = again
            outputs += self.abort_all("error")
        return outputs

    def restart(self) -> None:
        """Starts over after a failure, with the programs that there are; requests get no last output.

        Raises:
            Exception: as `Runner.reset`.
        """
        for request_id in self.unfinished:
            record = self.unfinished.get(request_id)[0].assembler.metrics
            if record is not None:
                self.metrics.request_finished(record, "error")
        self.unfinished.clear()
        self._in_flight.clear()
        self.scheduler.clear()
        self._clock = StepClock()
        self.balancer.abandon_round()
        self.runner.reset()
        self._failures_in_a_row, self.failure = 0, None
        self.metrics.engine_restarted()

    def drain(self) -> None:
        """Waits for the steps in flight, which work for requests that have all ended."""
        while self._in_flight:
            self._give_out(*self._read(self._in_flight.popleft()), [])

    def abort_all(self, reason: FinishReason = "abort") -> list[RequestOutput]:
        """Ends every request, and gives their last outputs."""
        self._in_flight.clear()
        self.scheduler.abandon()
        return list(filter(None, [self.abort(request_id, reason) for request_id in list(self.unfinished)]))

    # To the device

    def _dispatch(self, plan: StepPlan, outputs: list[RequestOutput]) -> None:
        """Gives the device a step.

        What a row may choose that is held to a grammar depends on its token before, which may be in flight.
        So the steps before are read, and the masks computed, while the device works on the forward pass.
        """
        samples = self.unfinished.samples
        size = self.runner.lowering.buckets.largest.tokens  # of the step, if it is to score
        scored, targets = prompts_to_score(plan, samples, size) if self.unfinished.any_scored else ((), {})
        begun = self.runner.dispatch(plan, self._admissions(plan), scores=bool(targets))
        self._clock.dispatched(begun.packed_at, busy=self._is_busy())
        held = held_rows(plan, samples) if self.unfinished.any_constrained else []
        before = [self._read(self._in_flight.popleft()) for _ in range(num_needed(self._in_flight, held))]
        try:
            step = self.runner.sample(begun, self._compute_masks(held))
            wanted = self.unfinished.any_logprobs and any(map(self._wants_logprobs, plan.rows))
            logprobs = self.runner.logprobs(step) if wanted else None
            scores = self.runner.score(step, targets) if targets else None
            for array in (*(logprobs or ()), *(scores or ())):
                array.copy_to_host_async()
            self._in_flight.append(InFlight(step.sampled(), logprobs, scores, scored))
        finally:
            for done in before:
                self._give_out(*done, outputs)
        for _, sample, constraint in held:
            if constraint.error is not None and not sample.assembler.finished:
                self._fail(sample.assembler, constraint.error)
                outputs += filter(None, [self._take(sample.assembler)])

    def _compute_masks(self, held: Sequence[HeldRow]) -> RowMasks | None:
        """Masks of those rows whose outputs go on. All that is known of them has been read."""
        going_on = [(row, constraint) for row, _, constraint in held if constraint.goes_on]
        if not going_on:
            return None
        rows, constraints = zip(*going_on, strict=True)
        return rows, self._masks.compute(constraints)

    def _admissions(self, plan: StepPlan) -> dict[int, Admission]:
        admitted = set(plan.admitted)
        newcomers = [row for row in plan.rows if row.request_id in admitted] if admitted else []
        return {row.row: self._admission(self.unfinished.samples[row.request_id]) for row in newcomers}

    def _admission(self, sample: Sample) -> Admission:
        request, assembler = sample.request, sample.assembler
        if assembler.num_cached_tokens is None:
            assembler.num_cached_tokens = request.num_cached_tokens
        if assembler.metrics is not None:
            self.metrics.request_scheduled(assembler.metrics, num_cached_tokens=request.num_cached_tokens)
        return Admission(request.token_ids, self._settings(sample))

    def _settings(self, sample: Sample) -> RowSettings:
        input = sample.assembler.input
        return row_settings(
            self.runner.lowering.sampler,
            input.params,
            seed=sample.seed,
            prompt_token_ids=input.prompt_token_ids,
            output_token_ids=sample.request.output_token_ids,
            # a grammar holds them back by itself
            stop_token_ids=() if input.grammar else input.eos_token_ids | input.stop_token_ids,
            bad_word_ids=input.bad_word_ids,
        )

    def _wants_logprobs(self, row: RowPlan) -> bool:
        return (
            row.samples and self.unfinished.samples[row.request_id].assembler.input.num_logprobs is not None
        )

    # From the device

    def _read(self, done: InFlight) -> tuple[InFlight, NewTokens]:
        """Waits for a step's tokens, and takes them as far as later steps need them."""
        tokens = done.step.read()
        self._clock.read(done.step.packed_at)
        self.metrics.experts_used(self.balancer.count(done.step))
        new_tokens = self.scheduler.complete(done.step.plan, tokens)
        for request, new in new_tokens if self.unfinished.any_constrained else ():
            constraint = self.unfinished.samples[request.request_id].constraint
            if constraint is not None:
                constraint.accept(new)
        return done, new_tokens

    def _give_out(self, done: InFlight, new_tokens: NewTokens, outputs: list[RequestOutput]) -> None:
        """Adds what a step has brought to the outputs of its requests."""
        logprobs, scores = StepLogprobs(done.logprobs), StepLogprobs(done.scores)
        touched: dict[str, OutputAssembler] = {}
        for sample, begin, count in done.scored:
            if sample.assembler.finished:
                continue
            try:
                sample.assembler.add_prompt_logprobs([scores[begin + i] for i in range(count)])
            except Exception as error:
                self._fail_in_text(sample.assembler, error)
                touched[sample.assembler.request_id] = sample.assembler
        rows = zip(done.step.plan.rows, done.step.places, strict=True) if done.logprobs else ()
        row_of = {row.request_id: place for row, place in rows}
        for request, new in new_tokens:
            sample = self.unfinished.samples[request.request_id]
            if new and not sample.assembler.finished:
                self._add_tokens(sample, new, logprobs, row_of.get(request.request_id))
                touched[sample.assembler.request_id] = sample.assembler
        outputs += filter(None, [self._take(assembler) for assembler in touched.values()])

    def _add_tokens(
        self, sample: Sample, tokens: Sequence[int], logprobs: StepLogprobs, row: int | None
    ) -> None:
        """Gives a sample its tokens and ends it if they do. A failure ends this request and no other.

        Args:
            row: where the step's logprobs have the sample's, if there are any.
        """
        assembler = sample.assembler
        if sample.constraint is not None and sample.constraint.error is not None:
            self._fail(assembler, sample.constraint.error)
            return
        end = sample.end(tokens[-1])
        wanted = assembler.input.num_logprobs is not None
        try:
            found = assembler.add_tokens(
                sample.index,
                tokens,
                logprobs=[logprobs[row]] if wanted and row is not None else None,
                finish_reason=end.reason,
                stop_reason=end.stop_reason,
                stop_token=not end.is_text,
            )
        except Exception as error:
            self._fail_in_text(assembler, error)
            return
        if assembler.metrics is not None:
            self.metrics.tokens_generated(assembler.metrics, len(tokens), index=sample.index)
        if found is not None or end.reason is not None:
            self.scheduler.finish(sample.request.request_id, _STATUS[end.reason or "stop"])

    def _fail_in_text(self, assembler: OutputAssembler, error: Exception) -> None:
        logger.error("request %r: its tokens cannot be text", assembler.request_id, exc_info=error)
        self._fail(assembler, error)

    def _fail(self, assembler: OutputAssembler, error: Exception) -> None:
        """Ends a request, all of its samples, with an error."""
        self.last_error = assembler.error = error
        assembler.abort("error")
        for sample in self.unfinished.get(assembler.request_id):
            self.scheduler.finish(sample.request.request_id, RequestStatus.FINISHED_ERROR)

    def _take(self, assembler: OutputAssembler) -> RequestOutput | None:
        """The request's next output; forgets the request with the last one."""
        output = assembler.take()
        if assembler.finished:
            self.unfinished.remove(assembler.request_id)
            if assembler.metrics is not None and output is not None:
                self.metrics.request_finished(assembler.metrics, output.outputs[0].finish_reason or "abort")
        return output
