"""Runs the scheduler's plans on the devices: weights, pages, rows, and the programs that bind them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array

from jaxllm.runner.buckets import Bucket
from jaxllm.runner.host_copy import HostCopy
from jaxllm.runner.lowering import Lowering, step_programs
from jaxllm.runner.programs import Programs
from jaxllm.runner.step import DeviceRows, Forward, Logprobs
from jaxllm.sampling.state import RowSettings
from jaxllm.scheduler.plan import PageUpdate, StepPlan

DeviceState = tuple[tuple[Array, ...] | None, DeviceRows | None]
"""Pages and rows; None while the engine sleeps."""


@dataclass(frozen=True)
class Admission:
    """A request's part of the rows, for one that gets a row in the step."""

    token_ids: Sequence[int]
    """All it knows: prompt, and outputs where it resumes."""
    settings: RowSettings


def allocate(programs: Programs) -> DeviceState:
    """Empty pages and rows, each made in its place."""
    programs.wait(["empty"])
    return programs["empty"]()


class Runner:
    """Holds the device's state. Methods start work there and return before it is done.

    Args:
        lowering: what the programs are made of.
        params: the weights, in the shapes and shardings that the lowering has.
        num_pages: of the pool, the null page included.
        programs: those of the lowering; the first of them have been made, others may be made meanwhile.
        state: what `allocate` returns.
        exact: take the bucket that fits a step best, and compile it where nobody has; otherwise the best of
            those that are there.
    """

    def __init__(
        self,
        lowering: Lowering,
        params: tuple[Array, ...],
        num_pages: int,
        programs: Programs,
        state: DeviceState,
        *,
        exact: bool = False,
    ) -> None:
        self.lowering = lowering
        self.num_pages = num_pages
        self.programs = programs
        self._params: tuple[Array, ...] | None = params
        self._exact = exact
        self._kept: list[HostCopy] | None = None
        """The weights, while it sleeps."""
        self._cache, self._rows = state

    @property
    def params(self) -> tuple[Array, ...]:
        """The weights; none while it sleeps."""
        return self._params or ()

    def dispatch(
        self,
        plan: StepPlan,
        admissions: Mapping[int, Admission],
        *,
        scores: bool = False,
        bucket: Bucket | None = None,
    ) -> "DispatchedStep":
        """Starts a step.

        Args:
            plan: with at least one row.
            admissions: for each row that the plan gives to a request, that request.
            scores: `score` will be called with it.
            bucket: that it runs in; by default the best one.
        """
        whole, grown = _split_updates(plan, admissions)
        for row, admission in admissions.items():
            self._admit(row, admission, whole[row])
        bucket = bucket or self._choose_bucket(plan.num_tokens, scores=scores)
        packed = self.lowering.step_layout(bucket).pack(plan, grown)
        packed_at = time.perf_counter()
        rows = self._rows
        assert rows is not None
        forward = self.programs["forward", bucket.tokens]
        self._cache, tables, output = forward(self._params, self._cache, rows.tables, rows.tokens, packed)
        sample = self.programs["sample", bucket.sampled]
        tokens, state, sampled = sample(rows.tokens, rows.sampler, output.logits, output.rows, output.lengths)
        self._rows = DeviceRows(tokens, tables, state)
        sampled.copy_to_host_async()
        return DispatchedStep(plan, output, sampled, packed_at)

    def _choose_bucket(self, num_tokens: int, *, scores: bool) -> Bucket:
        """The smallest bucket whose programs are there and that holds so many tokens."""
        buckets = self.lowering.buckets
        if scores:
            return buckets.largest
        if self._exact:
            return buckets.fit(num_tokens)
        fitting = buckets.holding(num_tokens)
        there = (b for b in fitting if all(key in self.programs for key in step_programs(b)))
        return next(there, buckets.largest)

    def _admit(self, row: int, admission: Admission, updates: Sequence[PageUpdate]) -> None:
        groups, _, columns = self.lowering.table_shape
        tables = np.zeros((groups, columns), np.int32)
        for update in updates:
            tables[update.group, update.index : update.index + len(update.pages)] = update.pages
        tokens = np.zeros(self.lowering.sizes.max_model_len + 1, np.int32)
        tokens[: len(admission.token_ids)] = admission.token_ids
        admit = self.programs["admit", admission.settings.tables is not None]
        self._rows = admit(self._rows, np.int32(row), tokens, tables, admission.settings)

    def logprobs(self, step: "DispatchedStep") -> Logprobs:
        """Logprobs of the step's sampled tokens, of the model's own distribution."""
        return self.programs["logprobs", len(step.tokens)](step.forward.logits, step.tokens)

    def score(self, step: "DispatchedStep", targets: Mapping[int, int]) -> Logprobs:
        """Logprobs of given tokens: `targets` maps a token's index in the flat batch to the one after it."""
        ids = np.zeros(len(step.forward.hidden), np.int32)
        ids[list(targets)] = list(targets.values())
        return self.programs["score"](self._params, step.forward.hidden, ids)

    def sleep(self, *, keep_weights: bool) -> None:
        """Frees the device: pages and rows are dropped, weights go to the host's memory or are dropped."""
        if keep_weights:
            self._kept = [HostCopy.of(array) for array in self.params]
        self._free()

    def reset(self) -> None:
        """Starts over with empty pages and rows, after a step has failed that may have taken the old ones."""
        self._cache, self._rows = allocate(self.programs)

    def wake(self, load: Callable[[], tuple[Array, ...]]) -> None:
        """Takes the weights again, with empty pages and rows.

        Args:
            load: called for the weights, where `sleep` has dropped them.
        """
        self._params = load() if self._kept is None else tuple(copy.upload() for copy in self._kept)
        self._kept = None
        self._cache, self._rows = allocate(self.programs)

    def close(self) -> None:
        """Frees all device memory. The runner is of no use afterwards."""
        self.programs.close()
        self._free()

    def _free(self) -> None:
        self._drop((self._params, self._cache, self._rows))
        self._params = self._cache = self._rows = None

    @staticmethod
    def _drop(arrays: object) -> None:
        """Deletes arrays at once, whoever else still refers to them."""
        for array in jax.tree.leaves(arrays):
            array.delete()


@dataclass(frozen=True)
class DispatchedStep:
    """A step that the device has been given."""

    plan: StepPlan
    forward: Forward
    tokens: Array
    """int32, for each row of the step the token sampled."""
    packed_at: float
    """When the host had made all ready that the programs take, on the clock of `time.perf_counter`."""

    def is_done(self) -> bool:
        """Whether `read` would not wait."""
        return self.tokens.is_ready()  # pyright: ignore[reportAttributeAccessIssue]  # jax's stubs leave it out

    def read(self) -> list[list[int]]:
        """For each row of the plan the tokens it sampled: one or none. Waits for the device."""
        tokens = np.asarray(self.tokens).tolist()
        return [[token] if row.samples else [] for row, token in zip(self.plan.rows, tokens, strict=False)]


def _split_updates(
    plan: StepPlan, admissions: Mapping[int, Admission]
) -> tuple[dict[int, list[PageUpdate]], list[PageUpdate]]:
    """The whole tables of rows that are admitted, and the pages that other rows have grown by."""
    whole: dict[int, list[PageUpdate]] = {row: [] for row in admissions}
    grown = []
    for update in plan.page_updates:
        whole.get(update.row, grown).append(update)
    return whole, grown
