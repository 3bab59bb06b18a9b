"""One stage of a model on its devices: weights, pages, rows, and the programs that bind them."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Array, Int, Int32, UInt32

from jaxllm.layers.expert_copies import Copies
from jaxllm.parallel.placement import Placement
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.programs import Programs
from jaxllm.runner.step import DeviceRows, Forward, Logprobs
from jaxllm.sampling.state import RowSettings

DeviceState = tuple[tuple[Array, ...], DeviceRows]
"""Pages and rows."""

RowMasks = tuple[Sequence[int], UInt32[np.ndarray, "rows words"]]
"""Rows, and for each of them a bit for every token that it may choose next, the lowest first."""


def allocate(lowering: Lowering, programs: Programs) -> DeviceState:
    """A stage's empty pages and rows, each made in its place."""
    key = lowering.stage.key("empty")
    programs.wait([key])
    return programs[key]()


class StageRunner:
    """Holds a stage's state. Methods start work on its devices and return before it is done.

    Args:
        lowering: what the programs are made of.
        programs: those of all stages.
        params: the weights, in the shapes and shardings that the lowering has.
        state: what `allocate` returns.
    """

    def __init__(
        self, lowering: Lowering, programs: Programs, params: tuple[Array, ...], state: DeviceState
    ) -> None:
        self.lowering = lowering
        self._key = lowering.stage.key
        self._programs = programs
        self._params: tuple[Array, ...] | None = params
        self._cache: tuple[Array, ...] | None
        self._rows: DeviceRows | None
        self._cache, self._rows = state
        self._ready: set[Bucket] = set()
        self.placement = self._read_placement(params)
        """Of its experts; None where they have no slots to move between."""

    @property
    def params(self) -> tuple[Array, ...]:
        """The weights; none once they have been freed."""
        return self._params or ()

    def has_weights(self) -> bool:
        """Whether the weights are there and whole: a move that fails on the device does so after it began."""
        try:
            jax.block_until_ready(self._params)
        except RuntimeError:
            return False
        return self._params is not None

    @property
    def arrays(self) -> tuple[tuple[Array, ...], tuple[Array, ...], DeviceRows]:
        """Weights, pages and rows, as they are between two steps.

        Raises:
            RuntimeError: there are none while the engine sleeps.
        """
        if self._params is None or self._cache is None or self._rows is None:
            raise RuntimeError("the device's memory has been given back")
        return self._params, self._cache, self._rows

    def is_ready(self, bucket: Bucket) -> bool:
        """Whether all programs for such a step are there. Once they are, they stay."""
        if bucket not in self._ready:
            if not all(self._key(key) in self._programs for key in self.lowering.step_programs(bucket)):
                return False
            self._ready.add(bucket)
        return True

    def forward(self, bucket: Bucket, hidden: Array | None, packed: Int32[np.ndarray, " size"]) -> Forward:
        """Runs a step.

        Args:
            hidden: what left the stage before, on its devices or brought by a `Link`; None for the first.
            packed: what `StepLayout.pack` makes.
        """
        params, cache, rows = self.arrays
        entering = rows.tokens if hidden is None else jax.device_put(hidden, self.lowering.entering)
        program = self._programs[self._key(("forward", bucket.tokens, bucket.rows))]
        self._cache, tables, output = program(params, cache, rows.tables, entering, packed)
        self._rows = rows._replace(tables=tables)
        return output

    def sample(self, output: Forward) -> Int32[Array, " sampled"]:
        """Chooses the tokens after a forward pass of the last stage, and writes them into its rows."""
        _, _, rows = self.arrays
        program = self._programs[self._key(("sample", self._sampled(output.rows)))]
        tokens, state, sampled = program(
            rows.tokens, rows.sampler, output.logits, output.rows, output.lengths
        )
        self._rows = rows._replace(tokens=tokens, sampler=state)
        return sampled

    def load_masks(self, masks: RowMasks, output: Forward) -> None:
        """Puts masks into their rows; padded to one upload of each size that steps have."""
        _, _, rows = self.arrays
        (ids, words), sampled, state = masks, self._sampled(output.rows), rows.sampler
        assert state is not None
        padded_ids = np.full(len(output.rows), self.lowering.table_shape[1], np.int32)
        padded = np.zeros((len(output.rows), words.shape[1]), np.uint32)
        used = [0] * self.lowering.num_groups
        for row, word in zip(ids, words, strict=True):
            group, own = divmod(row, self.lowering.sizes.max_num_seqs)
            place = group * sampled + used[group]
            padded_ids[place], padded[place] = own, word
            used[group] += 1
        allowed = self._programs[self._key(("masks", sampled))](state.tables.allowed, padded_ids, padded)
        state = replace(state, tables=replace(state.tables, allowed=allowed))
        self._rows = rows._replace(sampler=state)

    def receive(self, ids: Array, lengths: Array, tokens: Array | Int32[np.ndarray, " sampled"]) -> None:
        """Writes tokens that another stage has chosen into the rows `ids`, which had `lengths` tokens."""
        _, _, rows = self.arrays
        program = self._programs[self._key(("receive", self._sampled(tokens)))]
        self._rows = rows._replace(tokens=program(rows.tokens, ids, lengths, tokens))

    def admit(self, row: int, tokens: np.ndarray, tables: np.ndarray, settings: RowSettings) -> None:
        """Gives a row to a request; what the stage keeps nothing of is not sent to it."""
        program = self._programs[self._key(("admit", settings.tables is not None))]
        group, own = divmod(row, self.lowering.sizes.max_num_seqs)
        rows = np.full(self.lowering.num_groups, self.lowering.table_shape[1], np.int32)
        rows[group] = own
        self._rows = program(self._rows, rows, tokens, tables, settings)

    def _sampled(self, rows: Array | np.ndarray) -> int:
        """Entries of a data group in an array of all groups' sampled rows."""
        return len(rows) // self.lowering.num_groups

    def logprobs(self, output: Forward, tokens: Array) -> Logprobs:
        """Logprobs of the tokens that `sample` chose."""
        return self._programs[self._key(("logprobs", self._sampled(tokens)))](output.logits, tokens)

    def score(self, output: Forward, ids: Int32[np.ndarray, " tokens"]) -> Logprobs:
        """Logprobs of `ids[i]` as the token after number i of the flat batch."""
        return self._programs[self._key("score")](self._params, output.hidden, ids)

    def move_experts(self, layer: int, experts: Int[np.ndarray, " slots"]) -> None:
        """Moves the experts of one layer to other slots, between two steps.

        If that fails, the weights are dropped: some may have moved, and others not. On the device it may fail
        later, which `has_weights` tells.

        Args:
            layer: number of it among the stage's layers with experts.
            experts: that the slots are to have.
        """
        assert self.placement is not None
        after = self.placement.replaced(layer, experts)
        source = after.sources(self.placement, layer)
        table = after.tables(self._copies.most)[layer]
        own, shapes, params = self.lowering.experts[layer], self.lowering.params, list(self.arrays[0])
        try:
            for place in own.weights:
                program = self._programs[self._key(self.lowering.gather_key(shapes[place]))]
                params[place] = program(params[place], source)
            sharding = shapes[own.table].sharding
            params[own.table] = jax.make_array_from_callback(table.shape, sharding, table.__getitem__)
        except Exception:
            self._params = tuple(params)  # what has moved goes, too, whoever keeps the error
            self.free()
            raise
        self._params, self.placement = tuple(params), after

    def can_move_experts(self) -> bool:
        """Whether all programs for that are there."""
        return all(self._key(key) in self._programs for key in self.lowering.gather_programs)

    @property
    def _copies(self) -> Copies:
        mixture = self.lowering.model.mixture
        assert mixture is not None
        assert mixture.copies is not None
        return mixture.copies

    def _read_placement(self, params: tuple[Array, ...]) -> Placement | None:
        """Where the experts of these weights are, which their tables say."""
        if not self.lowering.experts:
            return None
        tables = np.stack([np.asarray(params[layer.table]) for layer in self.lowering.experts])
        return Placement.of_tables(tables, self._copies.slots, self._copies.devices)

    def free(self) -> None:
        """Drops weights, pages and rows."""
        _delete(self._params)
        self._params = None
        self._drop_state()

    def reset(self) -> None:
        """Empties pages and rows, whatever is left of them. Does nothing while the engine sleeps."""
        if self._params is not None:
            self._drop_state()
            self._cache, self._rows = allocate(self.lowering, self._programs)

    def _drop_state(self) -> None:
        """Frees pages and rows: the devices have no room for those and for new ones."""
        _delete((self._cache, self._rows))
        self._cache = self._rows = None

    def wake(self, params: tuple[Array, ...]) -> None:
        """Takes the weights again, in their shardings, with empty pages and rows."""
        self._params, self.placement = params, self._read_placement(params)
        self.reset()


def _delete(arrays: object) -> None:
    """Frees arrays at once, whoever else still refers to them."""
    for array in jax.tree.leaves(arrays):
        array.delete()
