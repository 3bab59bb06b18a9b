"""Runs the scheduler's plans on the devices: weights, pages, rows, and the programs that bind them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxllm.runner.lowering import Lowering
from jaxllm.runner.programs import Programs
from jaxllm.runner.step import DeviceRows, Forward, Logprobs
from jaxllm.sampling.state import RowSettings
from jaxllm.scheduler.plan import PageUpdate, StepPlan


@dataclass(frozen=True)
class Admission:
    """A request's part of the rows, for one that gets a row in the step."""

    token_ids: Sequence[int]
    """All it knows: prompt, and outputs where it resumes."""
    settings: RowSettings


class Runner:
    """Holds the device's state. Methods start work there and return before it is done.

    Attributes:
        lowering: what the programs are made of.
        num_pages: of the pool, the null page included.
        programs: the closed set.
    """

    def __init__(self, lowering: Lowering, params: tuple[Array, ...], num_pages: int) -> None:
        self.lowering = lowering
        self.num_pages = num_pages
        self.programs = Programs()
        self._params: tuple[Array, ...] | None = params
        declare = self.programs.declare
        for bucket in lowering.buckets.sizes:
            declare(("forward", bucket.tokens), partial(lowering.forward, bucket, num_pages))
        for sampled in lowering.buckets.sampled:
            declare(("sample", sampled), partial(lowering.sample, sampled))
            declare(("logprobs", sampled), partial(lowering.logprobs, sampled))
        for with_tables in (False, True):
            declare(("admit", with_tables), partial(lowering.admit, with_tables))
        declare("score", lowering.score)
        self._cache, self._rows = self._allocate()

    def _allocate(self) -> tuple[tuple[Array, ...] | None, DeviceRows | None]:
        """Empty pages and rows, each made in its place."""
        shapes = self.lowering.cache_shapes(self.num_pages)
        shardings = tuple(shape.sharding for shape in shapes)
        pools = jax.jit(lambda: tuple(jnp.zeros(s.shape, s.dtype) for s in shapes), out_shardings=shardings)()
        return pools, jax.jit(self.lowering.empty_rows, out_shardings=self.lowering.replicated)()

    def dispatch(
        self, plan: StepPlan, admissions: Mapping[int, Admission], *, scores: bool = False
    ) -> "DispatchedStep":
        """Starts a step.

        Args:
            plan: with at least one row.
            admissions: for each row that the plan gives to a request, that request.
            scores: `score` will be called with it.
        """
        whole, grown = _split_updates(plan, admissions)
        for row, admission in admissions.items():
            self._admit(row, admission, whole[row])
        buckets = self.lowering.buckets
        bucket = buckets.largest if scores else buckets.fit(plan.num_tokens)
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

    def sleep(self, *, keep_weights: bool) -> tuple[np.ndarray, ...] | None:
        """Frees the device: pages and rows are dropped, weights are returned in host memory or dropped."""
        params, self._params = self._params, None
        saved = tuple(np.array(p) for p in params) if keep_weights and params is not None else None
        self._drop((params, self._cache, self._rows))
        self._cache = self._rows = None
        return saved

    def reset(self) -> None:
        """Starts over with empty pages and rows, after a step has failed that may have taken the old ones."""
        self._cache, self._rows = self._allocate()

    def wake(self, params: tuple[Array, ...]) -> None:
        """Takes the weights again, with empty pages and rows."""
        self._params = params
        self._cache, self._rows = self._allocate()

    def close(self) -> None:
        """Frees all device memory. The runner is of no use afterwards."""
        self.sleep(keep_weights=False)
        self.programs = Programs()

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
