"""The step loop: plans go to the device, tokens come back, outputs go out."""

import logging
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxllm.engine.assembler import OutputAssembler, TokenLogprobs
from jaxllm.engine.inputs import EngineInput
from jaxllm.engine.metrics import EngineState, Metrics
from jaxllm.engine.outputs import FinishReason, RequestOutput
from jaxllm.engine.step_clock import StepClock
from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.runner.runner import Admission, DispatchedStep, Runner
from jaxllm.sampling.settings import row_settings
from jaxllm.sampling.state import RowSettings
from jaxllm.scheduler.plan import RowPlan, StepPlan
from jaxllm.scheduler.request import Request, RequestStatus
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


@dataclass(slots=True, eq=False)
class Sample:
    """One of a request's outputs, as it is scheduled: `n` of them share an assembler."""

    request: Request
    index: int
    seed: int
    assembler: OutputAssembler
    next_scored: int = 1
    """First position of the prompt whose logprobs no dispatched step computes."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that the device works on, and what is to be read from it."""

    step: DispatchedStep
    logprobs: tuple[jax.Array, ...] | None
    scores: tuple[jax.Array, ...] | None
    scored: tuple[tuple[Sample, int, int], ...]
    """For each prompt in `scores`: where its tokens begin in the flat batch, and how many there are."""


class EngineCore:
    """Requests in, outputs out, one step at a time.

    With `depth` 1 the host plans and dispatches a step before it reads the one before; with depth 0 it reads
    each step at once. The tokens are the same.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        vocabulary: Vocabulary | None,
        *,
        depth: int,
        seed: int,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.metrics = Metrics()
        self.vocabulary = vocabulary
        self._depth = depth
        self._random = random.Random(seed)
        self._samples: dict[str, Sample] = {}
        self._requests: dict[str, list[Sample]] = {}
        self._scoring: set[str] = set()
        """Requests that want their prompts' logprobs."""
        self._in_flight: deque[InFlight] = deque()
        self._clock = StepClock()
        self._failures_in_a_row = 0
        self.last_error: Exception | None = None
        """Why requests have ended with errors, most recently."""
        self.failure: Exception | None = None
        """Why the engine has failed, if it has."""

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._requests)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not given out their last output."""
        return len(self._requests)

    def __contains__(self, request_id: object) -> bool:
        """Whether an unfinished request has this id."""
        return request_id in self._requests

    def get_metrics(self) -> dict[str, float]:
        """What has been counted, and how things stand; see `Metrics.snapshot`."""
        cache = self.scheduler.cache.stats()
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
        if request_id in self._requests:
            raise ValueError(f"request_id={request_id!r}: an unfinished request has this id; choose another")
        params = input.params
        seed = self._random.getrandbits(64) if params.seed is None else params.seed
        assembler = OutputAssembler(request_id, input, self.vocabulary)
        samples = [
            Sample(self._request(request_id, index, input), index, seed + index, assembler)
            for index in range(params.n)
        ]
        self._settings(samples[0])  # refuses what a row has no room for
        for sample in samples:  # they are alike, so only the first can be refused
            self.scheduler.add(sample.request)
            self._samples[sample.request.request_id] = sample
        assembler.metrics = self.metrics.request_arrived(len(input.prompt_token_ids))
        self._requests[request_id] = samples
        if input.num_prompt_logprobs is not None:
            self._scoring.add(request_id)

    def _request(self, request_id: str, index: int, input: EngineInput) -> Request:
        wants_scores = index == 0 and input.num_prompt_logprobs is not None
        return Request(
            request_id if input.params.n == 1 else f"{request_id}/{index}",
            input.prompt_token_ids,
            input.max_tokens,
            priority=input.priority,
            cache_salt=input.cache_salt,
            skip_prefix_cache=wants_scores or bool(input.params.skip_reading_prefix_cache),
        )

    def abort(self, request_id: str, reason: FinishReason = "abort") -> RequestOutput | None:
        """Ends a request and gives its last output; None if no unfinished request has this id."""
        samples = self._requests.get(request_id)
        if samples is None:
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
            raise EngineFailedError("the engine has failed; make another") from self.failure
        self._clock.begin(busy=self._is_busy())
        plan = self.scheduler.schedule()
        self._clock.scheduled(len(plan.rows), plan.num_tokens)
        for request_id in plan.preempted:
            record = self._samples[request_id].assembler.metrics
            assert record is not None
            self.metrics.request_preempted(record)
        try:
            outputs = self._run(plan)
            self._failures_in_a_row = 0
        except Exception as error:
            outputs = self._recover(error)
        self.metrics.step_done(self._clock.end(idle=not self._requests))
        return outputs

    def _is_busy(self) -> bool:
        """Whether the device still works on the step that it was given last."""
        return bool(self._in_flight) and not self._in_flight[-1].step.is_done()

    def _run(self, plan: StepPlan) -> list[RequestOutput]:
        if plan.rows:
            self._in_flight.append(self._dispatch(plan))
        if self._in_flight and (not plan.rows or len(self._in_flight) > self._depth):
            return self._collect(self._in_flight.popleft())
        return []

    def _recover(self, error: Exception) -> list[RequestOutput]:
        """Ends the requests that were running, and starts over with empty pages: theirs may hold anything."""
        logger.error("a step failed; the requests in it end with errors", exc_info=error)
        self.last_error = error
        self._failures_in_a_row += 1
        if self._failures_in_a_row == MOST_FAILURES:
            self.failure = error
            return self.abort_all("error")
        self._in_flight.clear()
        failed = {self._samples[r.request_id].assembler.request_id for r in self.scheduler.abandon()}
        outputs = [self.abort(request_id, "error") for request_id in failed]
        self.runner.reset()
        return [output for output in outputs if output is not None]

    def drain(self) -> None:
        """Waits for the steps in flight, which work for requests that have all ended."""
        while self._in_flight:
            self._collect(self._in_flight.popleft())

    def abort_all(self, reason: FinishReason = "abort") -> list[RequestOutput]:
        """Ends every request, and gives their last outputs."""
        self._in_flight.clear()
        self.scheduler.abandon()
        outputs = [self.abort(request_id, reason) for request_id in list(self._requests)]
        return [output for output in outputs if output is not None]

    # To the device

    def _dispatch(self, plan: StepPlan) -> InFlight:
        admitted = set(plan.admitted)
        newcomers = [row for row in plan.rows if row.request_id in admitted] if admitted else []
        admissions = {row.row: self._admission(self._samples[row.request_id]) for row in newcomers}
        scored, targets = self._prompts_to_score(plan)
        step = self.runner.dispatch(plan, admissions, scores=bool(targets))
        self._clock.dispatched(step.packed_at, busy=self._is_busy())
        logprobs = self.runner.logprobs(step) if any(map(self._wants_logprobs, plan.rows)) else None
        scores = self.runner.score(step, targets) if targets else None
        for array in (*(logprobs or ()), *(scores or ())):
            array.copy_to_host_async()
        return InFlight(step, logprobs, scores, scored)

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
            stop_token_ids=input.eos_token_ids | input.stop_token_ids,
            bad_word_ids=input.bad_word_ids,
        )

    def _wants_logprobs(self, row: RowPlan) -> bool:
        return row.samples and self._samples[row.request_id].assembler.input.num_logprobs is not None

    def _prompts_to_score(self, plan: StepPlan) -> tuple[tuple[tuple[Sample, int, int], ...], dict[int, int]]:
        """Which of the step's tokens stand before prompt tokens whose logprobs are wanted, and the latter."""
        scored: list[tuple[Sample, int, int]] = []
        targets: dict[int, int] = {}
        if not self._scoring:
            return (), targets
        first = 0
        for row in plan.rows:
            sample = self._samples[row.request_id]
            if sample.index == 0 and sample.assembler.input.num_prompt_logprobs is not None:
                prompt = sample.request.prompt_token_ids
                # after a preemption the first positions come again
                end = min(row.start + row.num_tokens + 1, len(prompt))
                positions = range(max(row.start + 1, sample.next_scored), end)
                if positions:
                    begin = first + positions.start - 1 - row.start
                    scored.append((sample, begin, len(positions)))
                    targets.update((begin + i, prompt[position]) for i, position in enumerate(positions))
                    sample.next_scored = positions.stop
            first += row.num_tokens
        return tuple(scored), targets

    # From the device

    def _collect(self, done: InFlight) -> list[RequestOutput]:
        tokens = done.step.read()
        self._clock.read(done.step.packed_at)
        if done.step.expert_load:
            self.metrics.experts_used(np.concatenate(done.step.expert_load))
        logprobs = _Logprobs(done.logprobs)
        scores = _Logprobs(done.scores)
        touched: dict[str, OutputAssembler] = {}
        for sample, begin, count in done.scored:
            if sample.assembler.finished:
                continue
            sample.assembler.add_prompt_logprobs([scores[begin + i] for i in range(count)])
        rows = done.step.plan.rows if done.logprobs else ()
        row_of = {row.request_id: i for i, row in enumerate(rows)}
        for request, new in self.scheduler.complete(done.step.plan, tokens):
            if new:
                sample = self._samples[request.request_id]
                self._add_tokens(sample, new, logprobs, row_of.get(request.request_id))
                touched[sample.assembler.request_id] = sample.assembler
        outputs = [self._take(assembler) for assembler in touched.values()]
        return [output for output in outputs if output is not None]

    def _add_tokens(
        self, sample: Sample, tokens: Sequence[int], logprobs: "_Logprobs", row: int | None
    ) -> None:
        """Gives a sample its tokens and ends it if they do. A failure ends this request and no other.

        Args:
            row: where the step's logprobs have the sample's, if there are any.
        """
        request, assembler = sample.request, sample.assembler
        reason, stop = self._end(request, assembler.input, tokens[-1])
        wanted = assembler.input.num_logprobs is not None
        try:
            found = assembler.add_tokens(
                sample.index,
                tokens,
                logprobs=[logprobs[row]] if wanted and row is not None else None,
                finish_reason=reason,
                stop_reason=stop,
            )
        except Exception as error:
            logger.exception("request %r failed while its tokens were turned into text", assembler.request_id)
            self.last_error = error
            assembler.abort("error")
            for other in self._requests[assembler.request_id]:
                self.scheduler.finish(other.request.request_id, RequestStatus.FINISHED_ERROR)
            return
        if assembler.metrics is not None:
            self.metrics.tokens_generated(assembler.metrics, len(tokens), index=sample.index)
        if found is not None or reason is not None:
            self.scheduler.finish(request.request_id, _STATUS[reason or "stop"])

    @staticmethod
    def _end(request: Request, input: EngineInput, token: int) -> tuple[FinishReason | None, int | None]:
        """Whether a request ends with its newest token, and the stop token if that is why."""
        if len(request.output_token_ids) >= input.params.min_tokens:
            if token in input.eos_token_ids:
                return "stop", None
            if token in input.stop_token_ids:
                return "stop", token
        if len(request.output_token_ids) >= input.max_tokens:
            return "length", None
        return None, None

    def _take(self, assembler: OutputAssembler) -> RequestOutput | None:
        """The request's next output; forgets the request with the last one."""
        output = assembler.take()
        if assembler.finished:
            self._scoring.discard(assembler.request_id)
            for sample in self._requests.pop(assembler.request_id):
                del self._samples[sample.request.request_id]
            if assembler.metrics is not None and output is not None:
                self.metrics.request_finished(assembler.metrics, output.outputs[0].finish_reason or "abort")
        return output


class _Logprobs:
    """What `token_logprobs` left on the device, read when the first position of it is asked for."""

    def __init__(self, arrays: tuple[jax.Array, ...] | None) -> None:
        self._arrays = arrays
        self._read: list[np.ndarray] = []

    def __getitem__(self, position: int) -> TokenLogprobs:
        if not self._read:
            assert self._arrays is not None
            self._read = [np.asarray(array) for array in self._arrays]
        logprob, rank, ids, top = (array[position] for array in self._read)
        return TokenLogprobs(float(logprob), int(rank), ids.tolist(), top.tolist())
