"""Attention of tiles of queries over pages: the Mosaic GPU kernel for Hopper that decode and prefill share.

A tile is 64 rows of queries (token, head of the group) for each computing warpgroup, all of one row of the
batch and one kv head. One more warpgroup brings pages into shared memory with the copy engine, ahead of those
that compute; pages of 8 bits it also widens, since the tensor cores take both operands in one type.
The softmax is the online one in base 2, as in FlashAttention-3 (arXiv:2407.08608). A tile's keys can be
divided over several thread blocks, whose results are merged by their log-sum-exp (Flash-Decoding).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels._compat import load_registers, transposed_ref
from pallas_kernels.hopper import ROWS, share_roles, swizzle_bytes, tiled
from pallas_kernels.paged_attention.gpu_pages import PageStream, Piece, Pieces
from pallas_kernels.paged_attention.gpu_plan import Geometry, Plan, Score, widened_columns

LOG2E = math.log2(math.e)
MASKED = -1e30
"""Finite: the difference of two masked scores must be a number."""
MATRIX = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)


class Tiles(NamedTuple):
    """The queries of a call: each tile is some tokens of one row of the batch."""

    place: Int32[Array, "tiles 4"]
    """Of each tile the row, the first token in the flat batch, its position, the number of tokens."""
    number: Int32[Array, " 1"]
    """How many tiles there are; those after them are not touched."""


class Softmax(NamedTuple):
    """An online softmax of a warpgroup's rows, in base 2."""

    out: Float[Array, "rows dim"]
    top: Float[Array, " rows"]
    total: Float[Array, " rows"]


def attend_tiles(
    q: Float[Array, "kv_heads queries dim"],
    pages: Shaped[Array, "halves page_size dim"],
    page_table: Int32[Array, "rows columns"],
    tiles: Tiles,
    sinks: Float[Array, "kv_heads rows"] | None,
    scales: Float[Array, "kv_heads 2"] | None,
    *,
    plan: Plan,
    geometry: Geometry,
    score: Score,
    interpret: Any = None,
) -> tuple[Float[Array, "tiles splits kv_heads rows dim"], Float[Array, "tiles splits kv_heads rows"] | None]:
    """Each tile's attention, normalized by the keys of its split, and the log2 of their sum of weights.

    Args:
        q: token by token the heads of each group, and after them at least a tile of anything.
        pages: for each page and kv head its keys, then its values.
        sinks: for each row of a tile the score that has no value, times log2(e).
        scales: what the stored keys and values are multiplied with.
        interpret: parameters of Mosaic GPU's interpreter, to run on the CPU.

    Returns:
        In float32 with the sums of weights where there are splits; else in the type of the queries, and None.
    """
    num_tiles, rows = tiles.place.shape[0], plan.rows(geometry)
    partial_shape = (num_tiles, plan.splits, geometry.kv_heads)
    split = plan.splits > 1
    out_type = [
        jax.ShapeDtypeStruct((*partial_shape, rows, geometry.head_dim), jnp.float32 if split else q.dtype)
    ]
    if split:
        out_type.append(jax.ShapeDtypeStruct((*partial_shape, ROWS * plan.groups), jnp.float32))
    inputs = {"q": q, "pages": pages, "table": page_table, "tiles": tiles.place, "num_tiles": tiles.number}
    inputs |= {name: x for name, x in (("sinks", sinks), ("scales", scales)) if x is not None}
    scratch = scratch_types(plan, geometry)

    def body(*refs: Any) -> None:
        named = list(inputs) + (["out", "weight"] if split else ["out"]) + list(scratch)
        _run(SimpleNamespace(**dict(zip(named, refs, strict=True))), plan, geometry, score)

    results = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=list(scratch.values()),
        grid=(plan.blocks,),
        grid_names=("thread_block",),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*inputs.values())
    return (results[0], results[1]) if split else (results[0], None)


def scratch_types(plan: Plan, geometry: Geometry) -> dict[str, Any]:
    """Shared memory and barriers of a thread block, by name."""
    dtype, dim = geometry.dtype, geometry.head_dim
    copies = max(1, plan.block // geometry.page_size)
    ready = plgpu.Barrier(num_arrivals=1 if geometry.widens else copies, num_barriers=plan.stages)
    empty = plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages)
    scratch = {
        "tile": tiled((plan.groups, ROWS, dim), dtype),
        "k": tiled((plan.stages, plan.block, dim), dtype),
        "v": tiled((plan.stages, plan.block, dim), dtype),
        "q_ready": plgpu.Barrier(num_barriers=plan.groups),
        "k_ready": ready,
        "v_ready": ready,
        "k_empty": empty,
        "v_empty": empty,
    }
    if plan.groups > 1:
        scratch["v_clean"] = plgpu.Barrier(num_arrivals=plan.warpgroups)
    if plan.parts > 1:
        scratch["met"] = plgpu.Barrier(num_arrivals=plan.parts)
    if plan.splits > 1:
        scratch["out_tile"] = tiled((plan.warpgroups, ROWS, plan.stored(geometry)), jnp.dtype(jnp.float32))
        scratch["weight_tile"] = plgpu.SMEM((plan.warpgroups, ROWS), jnp.float32)
    if geometry.widens:
        arrived = plgpu.Barrier(num_arrivals=copies, num_barriers=plan.raw_stages)
        raw = tiled((plan.raw_stages, plan.block, dim), geometry.page_dtype, widened_columns(dim))
        scratch["raw_k"] = scratch["raw_v"] = raw
        scratch["raw_k_ready"] = scratch["raw_v_ready"] = arrived
    return scratch


def _run(refs: Any, plan: Plan, geometry: Geometry, score: Score) -> None:
    """One warpgroup's part."""
    pieces = Pieces(plan, geometry, score.sliding_window, refs.tiles, refs.num_tiles)
    share_roles(
        plan.warpgroups,
        plan.registers(geometry),
        lambda: PageStream(plan, geometry, refs, pieces).run(),
        lambda warpgroup: _Compute(plan, geometry, score, refs, pieces, warpgroup).run(),
    )


@dataclass(frozen=True)
class _Compute:
    """A computing warpgroup."""

    plan: Plan
    geometry: Geometry
    score: Score
    refs: Any
    pieces: Pieces
    warpgroup: Array

    @property
    def group(self) -> Array:
        """Of rows: which of the tile's."""
        return lax.div(self.warpgroup, jnp.int32(self.plan.parts))

    @property
    def columns(self) -> Any:
        """Of the results, that this warpgroup computes."""
        number = self.plan.columns(self.geometry)
        return pl.ds(lax.rem(self.warpgroup, jnp.int32(self.plan.parts)) * number, number)

    def run(self) -> None:
        """All pieces of this thread block."""
        if self.plan.rows(self.geometry) < ROWS:  # the rows that no query is copied to must hold numbers
            zeros = jnp.zeros((ROWS, self.plan.columns(self.geometry)), self.geometry.dtype)
            self.refs.tile[self.group, :, self.columns] = plgpu.layout_cast(zeros, MATRIX)
            plgpu.commit_smem()
        lax.fori_loop(0, self.pieces.count(), self._attend, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _attend(self, i: Array, used: Array) -> Array:
        """Attends for one piece; `used` counts the blocks of those before it."""
        piece = self.pieces.locate(i)
        self._load_queries(piece)
        unmasked_low, unmasked_high = self._blocks_without_mask(piece)
        state = self._start(piece)
        if self.score.sliding_window is not None:
            state = self._loop(piece, used, piece.low, unmasked_low, state, masked=True)
        state = self._loop(piece, used, unmasked_low, unmasked_high, state, masked=False)
        state = self._loop(piece, used, unmasked_high, piece.high, state, masked=True)
        self._store(self.pieces.locate(i), state)  # again: its numbers would take registers all along
        return used + piece.high - piece.low

    def _load_queries(self, piece: Piece) -> None:
        rows = min(self.plan.rows(self.geometry), ROWS)
        first = piece.token * self.geometry.group + self.group * ROWS
        ready = self.refs.q_ready.at[self.group]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last piece's output was in the same place
        self._meet()

        def copy() -> None:
            plgpu.copy_gmem_to_smem(
                self.refs.q.at[piece.head, pl.ds(first, rows)],
                self.refs.tile.at[self.group, pl.ds(0, rows)],
                ready,
            )

        self._once(copy)
        plgpu.barrier_wait(ready)

    def _once(self, action: Callable[[], None]) -> None:
        """Done by the first of those that share rows."""
        if self.plan.parts == 1:
            return action()
        pl.when(lax.rem(self.warpgroup, jnp.int32(self.plan.parts)) == 0)(action)

    def _meet(self) -> None:
        """Waits until those that share rows are done with their tile."""
        if self.plan.parts > 1:
            plgpu.barrier_arrive(self.refs.met)
            plgpu.barrier_wait(self.refs.met)

    def _blocks_without_mask(self, piece: Piece) -> tuple[Array, Array]:
        """The blocks in the middle that every token of the tile sees whole."""
        block = jnp.int32(self.plan.block)
        high = lax.div(piece.position + 1 - piece.base, block)
        high = jnp.clip(high, piece.low, piece.high)
        if self.score.sliding_window is None:
            return piece.low, high
        hidden = jnp.maximum(piece.end - self.score.sliding_window - piece.base, 0)
        low = jnp.clip(lax.div(hidden + (block - 1), block), piece.low, high)
        return low, high

    def _start(self, piece: Piece) -> Softmax:
        """Of no key; the sink is in the first split."""
        out = plgpu.layout_cast(jnp.zeros((ROWS, self.plan.columns(self.geometry)), jnp.float32), MATRIX)
        if "sinks" not in vars(self.refs):
            top = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), PER_ROW)
            return Softmax(out, top, plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW))
        rows = pl.ds(self.group * ROWS, ROWS)
        top = load_registers(self.refs.sinks.at[piece.head, rows], PER_ROW, optimized=False)
        first = (piece.split == 0).astype(jnp.float32)
        top = top * first + MASKED * (1 - first)
        return Softmax(out, top, plgpu.layout_cast(jnp.full((ROWS,), 1.0, jnp.float32), PER_ROW) * first)

    def _loop(
        self, piece: Piece, used: Array, low: Array, high: Array, state: Softmax, *, masked: bool
    ) -> Softmax:
        def step(block: Array, state: Softmax) -> Softmax:
            stage = lax.rem(used + block - piece.low, jnp.int32(self.plan.stages))
            first = piece.base + block * self.plan.block
            return self._take(piece, stage, first, state, masked=masked)

        return lax.fori_loop(low, high, step, state)

    def _take(self, piece: Piece, stage: Array, first: Array, state: Softmax, *, masked: bool) -> Softmax:
        """Takes one more block of keys into account, the first of them at position `first`."""
        refs = self.refs
        clean = masked and self.geometry.page_dtype != jnp.int8  # which has no NaN
        if clean:  # before the scores take registers
            plgpu.barrier_wait(refs.v_ready.at[stage])
            self._clean_values(piece, stage, first)
        plgpu.barrier_wait(refs.k_ready.at[stage])
        scores = pl.run_scoped(
            lambda product: self._multiply_keys(product, stage),
            plgpu.ACC((ROWS, self.plan.block), jnp.float32),  # pyright: ignore[reportPrivateImportUsage]
        )
        plgpu.barrier_arrive(refs.k_empty.at[stage])
        scores = self._scale(piece, scores)
        if masked:
            scores = jnp.where(self._seen(piece, first), scores, MASKED)
        top = jnp.maximum(state.top, scores.max(axis=1))
        rescale = jnp.exp2(state.top - top)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(top, scores.shape, [0]))
        total = state.total * rescale + weights.sum(axis=1)
        out = state.out * lax.broadcast_in_dim(rescale, state.out.shape, [0])
        weights = weights.astype(self.geometry.dtype)
        if not clean:
            plgpu.barrier_wait(refs.v_ready.at[stage])
        start: Any = plgpu.ACC.init(out)  # pyright: ignore[reportPrivateImportUsage]
        out = pl.run_state(lambda acc: plgpu.wgmma(acc, weights, refs.v.at[stage, :, self.columns]))(start)
        plgpu.barrier_arrive(refs.v_empty.at[stage])
        return Softmax(cast(Array, out), top, total)

    def _multiply_keys(self, product: Any, stage: Array) -> Array:
        plgpu.wgmma(product, self.refs.tile.at[self.group], transposed_ref(self.refs.k.at[stage]))
        return product[...]

    def _scale(self, piece: Piece, scores: Array) -> Array:
        """Scores in base 2. The cap's tanh by way of exp2: the hardware's own is good to 11 bits only."""
        scale: Any = self.score.scale
        if "scales" in vars(self.refs):
            scale = self.refs.scales[piece.head, 0] * scale
        cap = self.score.soft_cap
        if cap is None:
            return scores * (scale * LOG2E)
        return cap * LOG2E - (2 * cap * LOG2E) / (1 + jnp.exp2(scores * (scale * (2 * LOG2E / cap))))

    def _seen(self, piece: Piece, first: Array) -> Array:
        """Which keys of a block each row sees; a row without a token sees what the tile's last token does."""
        shape = (ROWS, self.plan.block)
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX) + first
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX) + self.group * ROWS
        position = jnp.minimum(lax.div(row, jnp.int32(self.geometry.group)) + piece.position, piece.end - 1)
        seen = key <= position
        if self.score.sliding_window is not None:
            seen &= key > position - self.score.sliding_window
        return seen

    def _clean_values(self, piece: Piece, stage: Array, first: Array) -> None:
        """Zeros for the values that no token of the tile sees: they may be NaN, and 0 * NaN is NaN."""

        dtype, dim = self.geometry.dtype, self.geometry.head_dim
        width = swizzle_bytes(dim * dtype.itemsize) // dtype.itemsize  # a whole row takes too many registers

        def clean() -> None:
            for chunk in range(0, self.plan.block, ROWS):
                key = plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 0, layout=MATRIX) + (first + chunk)
                seen = (key >= piece.begin) & (key < piece.end)
                for column in range(0, self.plan.columns(self.geometry), width):
                    columns = pl.ds(self.columns.start + column, width)
                    part = self.refs.v.at[stage, pl.ds(chunk, ROWS), columns]
                    values = load_registers(part, MATRIX)
                    part[...] = jnp.where(seen, values, jnp.zeros_like(values))
            plgpu.commit_smem()

        @pl.when((first < piece.begin) | (first + self.plan.block > piece.end))
        def _() -> None:
            if self.plan.groups == 1:
                return clean()

            # all arrive, so that none is a phase ahead of another, which would wait for ever
            pl.when(self.warpgroup == 0)(clean)
            plgpu.barrier_arrive(self.refs.v_clean)
            plgpu.barrier_wait(self.refs.v_clean)

    def _store(self, piece: Piece, state: Softmax) -> None:
        """Writes the normalized output, and with splits the sum of weights."""
        refs, split = self.refs, self.plan.splits > 1
        norm: Any = 1 / jnp.maximum(state.total, 1e-37)
        if "scales" in vars(refs):
            norm = norm * refs.scales[piece.head, 1]
        out = state.out * lax.broadcast_in_dim(norm, state.out.shape, [0])
        rows = min(self.plan.rows(self.geometry) // self.plan.groups, ROWS)
        place = refs.out.at[piece.tile, piece.split, piece.head, pl.ds(self.group * ROWS, rows)]
        if not split:
            self._meet()
            refs.tile[self.group, :, self.columns] = out.astype(self.geometry.dtype)
            plgpu.commit_smem()
            self._meet()
            staged = refs.tile.at[self.group, pl.ds(0, rows)]
            self._once(lambda: plgpu.copy_smem_to_gmem(staged, place))
            return
        weight = jnp.where(state.total > 0, state.top + jnp.log2(jnp.maximum(state.total, 1e-37)), MASKED)
        refs.weight_tile[self.warpgroup] = weight
        staged, number = refs.out_tile.at[self.warpgroup], self.plan.stored(self.geometry)
        for first in range(0, out.shape[1], number):
            if first > 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = lax.slice(out, (0, first), (ROWS, first + number))
            plgpu.commit_smem()
            columns = pl.ds(self.columns.start + first, number)
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, rows)], place.at[:, columns])
        weights = refs.weight.at[piece.tile, piece.split, piece.head, pl.ds(self.group * ROWS, ROWS)]
        plgpu.copy_smem_to_gmem(refs.weight_tile.at[self.warpgroup], weights)
