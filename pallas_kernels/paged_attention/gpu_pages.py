"""The pieces of work of a thread block, and the warpgroup that brings their pages into shared memory."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels._compat import load_registers
from pallas_kernels.hopper import ROWS
from pallas_kernels.paged_attention.gpu_plan import Geometry, Plan, widened_columns


def ceil_div(x: Array, y: int) -> Array:
    """Of numbers that are not negative."""
    return lax.div(x + (y - 1), jnp.int32(y))


class Piece(NamedTuple):
    """Blocks of keys for one tile and one kv head. Positions are those of keys in the row."""

    tile: Array
    head: Array
    split: Array
    row: Array
    token: Array
    """The first, in the flat batch."""
    position: Array
    """Of that token."""
    begin: Array
    """The first position that a token of the tile sees."""
    end: Array
    """One after the last one."""
    base: Array
    """Position of the first key of block 0."""
    low: Array
    high: Array
    """The blocks of this piece: low <= block < high."""


@dataclass(frozen=True)
class Pieces:
    """The work of one thread block."""

    plan: Plan
    geometry: Geometry
    sliding_window: int | None
    tiles: Any
    num_tiles: Any

    def count(self) -> Array:
        """How many pieces this thread block has."""
        total = self.num_tiles[0] * (self.geometry.kv_heads * self.plan.splits)
        mine = total - lax.axis_index("thread_block")
        return ceil_div(jnp.maximum(mine, 0), self.plan.blocks)

    def locate(self, i: Array) -> Piece:
        """The piece `i`: heads first, and the last tiles, whose context is the longest, before the others."""
        piece = lax.axis_index("thread_block") + i * self.plan.blocks
        split = lax.rem(piece, jnp.int32(self.plan.splits))
        rest = lax.div(piece, jnp.int32(self.plan.splits))
        head = lax.rem(rest, jnp.int32(self.geometry.kv_heads))
        tile = self.num_tiles[0] - 1 - lax.div(rest, jnp.int32(self.geometry.kv_heads))
        row, token, position, tokens = (self.tiles[tile, field] for field in range(4))
        end = position + tokens
        begin = jnp.int32(0)
        if self.sliding_window is not None:
            begin = jnp.maximum(position - (self.sliding_window - 1), 0)
        chunk = min(self.geometry.page_size, self.plan.block)
        base = lax.div(begin, jnp.int32(chunk)) * chunk
        blocks = ceil_div(end - base, self.plan.block)
        share = ceil_div(blocks, self.plan.splits)
        low = jnp.minimum(split * share, blocks)
        high = jnp.minimum(low + share, blocks)
        return Piece(tile, head, split, row, token, position, begin, end, base, low, high)


@dataclass(frozen=True)
class PageStream:
    """The warpgroup that fills the stages of keys and values that the computing ones empty."""

    plan: Plan
    geometry: Geometry
    refs: Any
    pieces: Pieces

    def run(self) -> None:
        """Streams the blocks of all pieces, then waits until the last ones are used."""
        stream = self._stream_widened if self.geometry.widens else self._stream
        filled = lax.fori_loop(0, self.pieces.count(), stream, jnp.int32(0))
        unused = jnp.minimum(filled, self.plan.stages)

        def drain(i: Array, carry: None) -> None:
            stage = lax.rem(filled - unused + i, jnp.int32(self.plan.stages))
            plgpu.barrier_wait(self.refs.k_empty.at[stage])
            plgpu.barrier_wait(self.refs.v_empty.at[stage])

        lax.fori_loop(0, unused, drain, None)

    def _stream(self, i: Array, filled: Array) -> Array:
        """Brings the blocks of a piece as they are."""
        piece, refs = self.pieces.locate(i), self.refs

        def fill(block: Array, filled: Array) -> Array:
            stage = lax.rem(filled, jnp.int32(self.plan.stages))
            self._wait_until_empty(refs.k_empty, stage, filled)
            self._copy(piece, block, 0, refs.k.at[stage], refs.k_ready.at[stage])
            self._wait_until_empty(refs.v_empty, stage, filled)
            self._copy(piece, block, 1, refs.v.at[stage], refs.v_ready.at[stage])
            return filled + 1

        return lax.fori_loop(piece.low, piece.high, fill, filled)

    def _stream_widened(self, i: Array, filled: Array) -> Array:
        """Brings the blocks of a piece, some ahead, and widens them to the type of the queries."""
        piece, refs, raw_stages = self.pieces.locate(i), self.refs, self.plan.raw_stages

        def bring(block: Array) -> None:
            raw = lax.rem(block - piece.low, jnp.int32(raw_stages))
            self._copy(piece, block, 0, refs.raw_k.at[raw], refs.raw_k_ready.at[raw])
            self._copy(piece, block, 1, refs.raw_v.at[raw], refs.raw_v_ready.at[raw])

        for ahead in range(raw_stages):
            pl.when(piece.low + ahead < piece.high)(lambda ahead=ahead: bring(piece.low + ahead))

        def fill(block: Array, filled: Array) -> Array:
            stage = lax.rem(filled, jnp.int32(self.plan.stages))
            raw = lax.rem(block - piece.low, jnp.int32(raw_stages))
            for half in (
                (refs.raw_k, refs.raw_k_ready, refs.k, refs.k_empty, refs.k_ready),
                (refs.raw_v, refs.raw_v_ready, refs.v, refs.v_empty, refs.v_ready),
            ):
                source, arrived, target, empty, ready = half
                plgpu.barrier_wait(arrived.at[raw])
                self._wait_until_empty(empty, stage, filled)
                self._widen(source.at[raw], target.at[stage])
                plgpu.commit_smem()  # for wgmma, and for the copy that overwrites what was read
                plgpu.barrier_arrive(ready.at[stage])
            pl.when(block + raw_stages < piece.high)(lambda: bring(block + raw_stages))
            return filled + 1

        return lax.fori_loop(piece.low, piece.high, fill, filled)

    def _widen(self, source: Any, target: Any) -> None:
        width = widened_columns(self.geometry.head_dim)
        for first in range(0, self.plan.block, ROWS):
            for column in range(0, self.geometry.head_dim, width):
                part = pl.ds(first, ROWS), pl.ds(column, width)
                narrow = load_registers(source.at[part], plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
                if self.geometry.page_dtype == jnp.float8_e4m3fn:  # the hardware makes it float16 only
                    narrow = narrow.astype(jnp.float16).astype(jnp.float32)
                target[part] = plgpu.layout_cast(narrow.astype(self.geometry.dtype), plgpu.Layout.WGMMA)

    def _wait_until_empty(self, empty: Any, stage: Array, filled: Array) -> None:
        pl.when(filled >= self.plan.stages)(lambda: plgpu.barrier_wait(empty.at[stage]))

    def _copy(self, piece: Piece, block: Array, half: int, target: Any, arrived: Any) -> None:
        """Starts the copies of a block's keys (half 0) or values (1).

        The last page that is seen stands in for those after it, which the table does not know: masked later.
        Pages are looked up for each half again: small ones are many, and would take registers in between.
        """
        size = self.geometry.page_size
        chunk = min(size, self.plan.block)
        first = piece.base + block * self.plan.block
        last_page = lax.div(piece.end - 1, jnp.int32(size))
        for j in range(self.plan.block // chunk):
            position = first + j * chunk
            page = self.refs.table[piece.row, jnp.minimum(lax.div(position, jnp.int32(size)), last_page)]
            source = self.refs.pages.at[(page * self.geometry.kv_heads + piece.head) * 2 + half]
            if chunk < size:
                source = source.at[pl.ds(lax.rem(position, jnp.int32(size)), chunk)]
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(j * chunk, chunk)], arrived)
