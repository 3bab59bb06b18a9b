"""Runs the scheduler's plans on the devices, through all stages of the model."""

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import jax
import numpy as np
from jaxtyping import Array, Int, Int32

from jaxllm.parallel.placement import Placement
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.far_stages import FarStages
from jaxllm.runner.host_copy import HostCopy
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.programs import Programs
from jaxllm.runner.stage import RowMasks, StageRunner
from jaxllm.runner.step import NUM_LOGPROBS, Forward, Logprobs
from jaxllm.sampling.state import RowSettings
from jaxllm.scheduler.plan import PageUpdate, StepPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admission:
    """A request's part of the rows, for one that gets a row in the step."""

    token_ids: Sequence[int]
    """All it knows: prompt, and outputs where it resumes."""
    settings: RowSettings


@dataclass(frozen=True)
class Returning:
    """Tokens that the last stage samples, on their way to the first, which need not wait for them yet."""

    rows: frozenset[int]
    """On the device."""
    ids: Array
    lengths: Array
    tokens: Array
    """On the first stage's devices, or on their way to the host."""


LoadWeights = Callable[[], Sequence[tuple[Array, ...]]]
"""Loads the weights of each stage here once more, in their shardings."""

Tokens = Array | Int32[np.ndarray, " sampled"]
"""What a step has sampled."""


class Runner:
    """Holds the device's state. Methods start work there and return before it is done.

    A step goes through the stages one after the other; as each has devices of its own, several steps of
    different rows can be under way at a time.

    Args:
        stages: those on this host, in order, each with programs of the same sizes; where the model is not
            cut, one.
        num_pages: of the pool, the null page included.
        programs: those of these stages; the first of them have been made, others may be made meanwhile.
        load: for when the weights have been dropped: by a sleep, or because a move of experts has failed.
        exact: take the bucket that fits a step best, and compile it where nobody has; otherwise the best of
            those that are there.
        far: where other hosts have other stages.
    """

    def __init__(
        self,
        stages: Sequence[StageRunner],
        num_pages: int,
        programs: Programs,
        load: LoadWeights,
        *,
        exact: bool = False,
        far: FarStages | None = None,
    ) -> None:
        self.stages = tuple(stages)
        self.num_pages = num_pages
        self.programs = programs
        self.bucket_steps: Counter[int] = Counter()
        """Steps so far, by the tokens that their programs are made for."""
        self._load = load
        self._exact = exact
        self._far = far
        self._parts = (*self.stages, *(() if far is None else far.links))
        self._returning: deque[Returning] = deque()
        self._is_asleep = False
        self._kept: list[list[HostCopy]] | None = None
        """Each stage's weights, while it sleeps with them in the host's memory."""

    @property
    def lowering(self) -> Lowering:
        """Of the last stage here; sizes are the same in all."""
        return self.stages[-1].lowering

    @property
    def params(self) -> tuple[tuple[Array, ...], ...]:
        """The weights of each stage here; none while it sleeps."""
        return tuple(stage.params for stage in self.stages)

    def dispatch(
        self,
        plan: StepPlan,
        admissions: Mapping[int, Admission],
        *,
        scores: bool = False,
        bucket: Bucket | None = None,
        returned: Sequence[Tokens] | None = None,
    ) -> "BegunStep":
        """Starts a step's forward pass. `sample` has to follow before another step begins.

        Args:
            plan: with at least one row.
            admissions: for each row that the plan gives to a request, that request.
            scores: `score` will be called with it.
            bucket: that it runs in; by default the best one.
            returned: the tokens of the oldest steps that the first stage has not taken; by default as many as
                `due` says.
        """
        self._receive(self.due(plan) if returned is None else returned)
        whole, grown = _split_updates(plan, admissions, self.lowering.sizes.max_num_seqs)
        for row, admission in admissions.items():
            self._admit(row, admission, whole[row])
        bucket = bucket or self._choose_bucket(plan, scores=scores)
        self.bucket_steps[bucket.tokens] += 1
        layout = self.lowering.step_layout(bucket)
        packed = np.concatenate([layout.pack(part, new) for part, new in zip(plan.parts, grown, strict=True)])
        packed_at = time.perf_counter()
        far, outputs = self._far, list[Forward]()
        hidden = None if far is None or far.entry is None else far.entry.receive(bucket)
        for stage in self.stages:
            outputs.append(stage.forward(bucket, hidden, packed))
            hidden = outputs[-1].hidden
        if far is not None and far.exit is not None:
            far.watch(far.exit.send(bucket, outputs[-1].hidden))
        return BegunStep(plan, tuple(outputs), packed_at)

    def sample(self, step: "BegunStep", masks: RowMasks | None = None) -> "DispatchedStep":
        """Starts to choose the step's tokens.

        Args:
            masks: for rows that are held to a grammar, what their tokens may be; the others' are not read.
        """
        outputs = step.outputs

        def choose(last: StageRunner) -> tuple[Array, ...]:
            if masks is not None:
                last.load_masks(masks, outputs[-1])
            return (last.sample(outputs[-1]),)

        [sampled] = self._at_end(choose, 1, len(outputs[-1].rows))
        first = self.stages[0].lowering.stage
        if first.is_first and first.count > 1:
            self._send(step.plan, outputs[0], sampled)
        expert_load = tuple(output.expert_load for output in outputs if output.expert_load is not None)
        for array in (sampled, *expert_load):
            array.copy_to_host_async()
        return DispatchedStep(
            step.plan, outputs[-1], sampled, step.packed_at, expert_load, tuple(self.placements.values())
        )

    def _at_end(
        self, do: Callable[[StageRunner], tuple[Array, ...]], count: int, length: int
    ) -> tuple[Array, ...]:
        """Has the last stage compute so many arrays of a length; if it is far, its host reports them."""
        last = self.stages[-1]
        if self._far is None:
            return do(last)
        if not last.lowering.stage.is_last:
            return self._far.expect(count, length)
        found = do(last)
        self._far.report(found)
        return found

    def _send(self, plan: StepPlan, entered: Forward, sampled: Array) -> None:
        """Sends the sampled tokens to the first stage. Between hosts they go by the hosts' memory."""
        rows = frozenset(row.row for row in plan.rows if row.samples)
        tokens = sampled if self._far else jax.device_put(sampled, self.stages[0].lowering.replicated)
        self._returning.append(Returning(rows, entered.rows, entered.lengths, tokens))

    def due(self, plan: StepPlan) -> list[Tokens]:
        """The tokens that the first stage is to take before a plan: what that needs, and what is there now.

        Not those of the newest steps, which other stages still work on: it would wait, and do nothing.
        """
        if not self._returning:  # as where the model is not cut
            return []
        rows = {row.row for row in plan.rows}
        needed = max((n for n, step in enumerate(self._returning, 1) if step.rows & rows), default=0)
        if self._far is None:
            there = len(self._returning) - self.stages[0].lowering.stage.count + 1
        else:
            there = sum(1 for _ in itertools.takewhile(lambda step: is_ready(step.tokens), self._returning))
        due: list[Tokens] = [step.tokens for step in itertools.islice(self._returning, max(needed, there))]
        return due if self._far is None else [np.asarray(tokens) for tokens in due]

    def _receive(self, returned: Sequence[Tokens]) -> None:
        """Has the first stage, if it is here, take the tokens of the oldest steps on their way to it."""
        if self.stages[0].lowering.stage.is_first:
            for tokens in returned:
                step = self._returning.popleft()
                self.stages[0].receive(step.ids, step.lengths, tokens)

    def _choose_bucket(self, plan: StepPlan, *, scores: bool) -> Bucket:
        """The smallest bucket whose programs are there and that holds the plan's tokens and rows."""
        buckets, size = self.lowering.buckets, (plan.most_tokens, plan.most_rows)
        if scores:
            return buckets.largest
        if self._exact:
            return buckets.fit(*size)
        fitting = buckets.holding(*size)
        there = (bucket for bucket in fitting if all(part.is_ready(bucket) for part in self._parts))
        return next(there, buckets.largest)

    def _admit(self, row: int, admission: Admission, updates: Sequence[PageUpdate]) -> None:
        groups, _, columns = self.lowering.table_shape
        tables = np.zeros((groups, columns), np.int32)
        for update in updates:
            tables[update.group, update.index : update.index + len(update.pages)] = update.pages
        tokens = np.zeros(self.lowering.sizes.max_model_len + 1, np.int32)
        tokens[: len(admission.token_ids)] = admission.token_ids
        for stage in self.stages:
            stage.admit(row, tokens, tables, admission.settings)

    @property
    def placements(self) -> dict[int, Placement]:
        """Where experts are that can move, of each stage that has such experts."""
        placed = {index: stage.placement for index, stage in enumerate(self.stages)}
        return {index: placement for index, placement in placed.items() if placement is not None}

    def can_move_experts(self) -> bool:
        """Whether `move_experts` needs to compile nothing, or may."""
        return self._exact or all(stage.can_move_experts() for stage in self.stages)

    def move_experts(self, stage: int, layer: int, experts: Int[np.ndarray, " slots"]) -> None:
        """Moves one layer's experts, after the steps begun and before the next; see `StageRunner`."""
        self.stages[stage].move_experts(layer, experts)

    def logprobs(self, step: "DispatchedStep") -> Logprobs:
        """Logprobs of the step's sampled tokens, of the model's own distribution."""
        forward, tokens = step.forward, step.tokens
        assert forward is not None
        found = self._at_end(lambda last: last.logprobs(forward, tokens), NUM_LOGPROBS, len(tokens))
        return cast(Logprobs, found)

    def score(self, step: "DispatchedStep", targets: Mapping[int, int]) -> Logprobs:
        """Logprobs of given tokens: `targets` maps a token's index in the flat batch to the one after it."""
        forward = step.forward
        assert forward is not None
        ids = np.zeros(len(forward.hidden), np.int32)
        ids[list(targets)] = list(targets.values())
        found = self._at_end(lambda last: last.score(forward, ids), NUM_LOGPROBS, len(ids))
        return cast(Logprobs, found)

    def sleep(self, *, keep_weights: bool) -> None:
        """Frees the devices: pages and rows are dropped, weights go to the host's memory or are dropped.

        Those that are gone, as after a move of experts that has failed, are loaded again by `wake`.
        """
        if keep_weights and self.has_weights():
            self._kept = [[HostCopy.of(array) for array in part] for part in self.params]
        self._is_asleep = True
        self._free()

    def has_weights(self) -> bool:
        """Whether all weights are there and whole, so that `reset` need not load them; waits for moves."""
        return all(stage.has_weights() for stage in self.stages)

    def reset(self) -> None:
        """Starts over with empty pages and rows, after a step has failed that may have taken the old ones.

        What is left of those goes first: the device has no room for both. Weights are loaded again where a
        move of experts has left them incomplete. Does nothing while it sleeps.

        Raises:
            Exception: there is no room, or the weights cannot be loaded. It may be tried again.
        """
        if self._is_asleep:
            return
        if self.has_weights():
            self._returning.clear()
            for stage in self.stages:
                stage.reset()
        else:
            logger.warning("weights are gone, as after a failed move of experts; all are loaded again")
            self._take(self._load)

    def wake(self) -> None:
        """Takes the weights again, from where `sleep` has left them, with empty pages and rows.

        Does nothing while it does not sleep.
        """
        if not self._is_asleep:
            return
        kept = self._kept
        self._take(self._load if kept is None else lambda: [tuple(c.upload() for c in part) for part in kept])
        self._kept, self._is_asleep = None, False

    def _take(self, load: LoadWeights) -> None:
        """Takes weights in place of what is left of others: the device has no room for both."""
        self._free()
        for stage, part in zip(self.stages, load(), strict=True):
            stage.wake(part)

    def close(self) -> None:
        """Frees all device memory. The runner is of no use afterwards."""
        self.programs.close()
        self._free()
        if self._far is not None:
            self._far.close()

    def _free(self) -> None:
        self._returning.clear()
        for part in self._parts:
            part.free()


@dataclass(frozen=True)
class BegunStep:
    """A step whose forward pass the device has been given."""

    plan: StepPlan
    outputs: tuple[Forward, ...]
    """Of each stage."""
    packed_at: float
    """When the host had made all ready that the forward pass takes, on the clock of `time.perf_counter`."""


@dataclass(frozen=True)
class DispatchedStep:
    """A step that the device has been given."""

    plan: StepPlan
    forward: Forward | None
    """For `Runner.logprobs` and `Runner.score`; None once they have been called, or need not be."""
    tokens: Array
    """int32, for each row of each data group's step the token sampled, and some to spare."""
    packed_at: float
    """When the host had made all ready that the programs take, on the clock of `time.perf_counter`."""
    expert_load: tuple[Int32[Array, "layers slots"], ...]
    """How many tokens went to each expert, or copy, where that is counted, of each stage with experts."""
    placements: tuple[Placement, ...]
    """Which experts these were, of each such stage, where experts can move."""

    def sampled(self) -> "DispatchedStep":
        """The step without its logits, whose memory the device has back as soon as it has read them.

        Those of 256 rows are 50 MB with a vocabulary of 49,152.
        """
        return replace(self, forward=None)

    def is_done(self) -> bool:
        """Whether `read` would not wait."""
        return is_ready(self.tokens)

    @property
    def places(self) -> list[int]:
        """Index of each of the plan's rows in `tokens`, and in what is computed from the same logits."""
        return self.plan.places(len(self.tokens) // len(self.plan.parts))

    def read(self) -> list[list[int]]:
        """For each row of the plan the tokens it sampled: one or none. Waits for the device."""
        tokens = np.asarray(self.tokens).tolist()
        return [
            [tokens[place]] if row.samples else []
            for row, place in zip(self.plan.rows, self.places, strict=True)
        ]


def is_ready(array: Array) -> bool:
    """Whether the host can read an array without waiting."""
    return array.is_ready()  # pyright: ignore[reportAttributeAccessIssue]  # jax's stubs leave it out


def _split_updates(
    plan: StepPlan, admissions: Mapping[int, Admission], num_rows: int
) -> tuple[dict[int, list[PageUpdate]], list[list[PageUpdate]]]:
    """The whole tables of rows that are admitted, and each data group's pages that others have grown by.

    Args:
        num_rows: of a data group.
    """
    whole: dict[int, list[PageUpdate]] = {row: [] for row in admissions}
    grown: list[list[PageUpdate]] = [[] for _ in plan.parts]
    for group, part in enumerate(plan.parts):
        for update in part.page_updates:
            whole.get(group * num_rows + update.row, grown[group]).append(update)
    return whole, grown
