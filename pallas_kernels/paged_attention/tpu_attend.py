"""The TPU kernel of paged attention: pages stream through VMEM while the pages before them are attended to.

Work is cut into tiles (queries of one row) and those into blocks (pages that a tile sees). All blocks of all
rows form one sequence. A cursor runs ahead of the block that is computed and starts the copies of what comes
next, be it of the same row or of another, so the queue of copies never runs dry between rows. Loops end where
the rows in use end; padding costs nothing.

Softmax is computed online as in FlashAttention-2 (https://arxiv.org/abs/2307.08691).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from pallas_kernels.paged_attention.tpu_copies import Copies, Cursor, Refs
from pallas_kernels.paged_attention.tpu_layout import LANES
from pallas_kernels.paged_attention.tpu_packed import (
    from_words,
    mask_rows,
    rows_in_word,
    to_words,
)
from pallas_kernels.paged_attention.tpu_plan import (
    Plan,
    Scalar,
    Span,
    divide,
    divide_up,
    remainder,
)

MASKED = -1e30


class Progress(NamedTuple):
    """What the loops over rows, tiles and blocks carry."""

    slot: Scalar
    """The buffer of the block at hand."""
    turn: Scalar
    """Tiles before this one, of all rows."""
    cursor: Cursor


@dataclass(frozen=True)
class Attend:
    """The kernel's body."""

    plan: Plan
    refs: Refs
    copies: Copies

    def run(self, first_row: Scalar) -> None:
        """Attends the rows from `first_row` up to the last of `copies`."""
        slots = self.plan.blocks.slots
        zero = jnp.zeros_like(first_row)
        cursor = Cursor(first_row, zero, zero)
        for slot in range(slots - 1):
            cursor = self.copies.fetch(cursor, jnp.int32(slot))
        start = Progress(zero, zero, cursor)
        last = lax.fori_loop(first_row, self.copies.end_row, self.do_row, start)

        @pl.when(last.turn > 0)
        def _() -> None:
            self.copies.result_copy(zero, zero).wait()
            if self.plan.decode:
                self.copies.patch_copy(zero, zero, zero).wait()

    def do_row(self, row: Scalar, progress: Progress) -> Progress:
        """All tiles of a row."""

        def do_tile(tile: Scalar, progress: Progress) -> Progress:
            seen = self.copies.span(row, tile)
            self.clear(progress.turn)

            def do_block(block: Scalar, progress: Progress) -> Progress:
                return self.do_block(row, tile, block, seen, progress)

            blocks = divide_up(seen.pages, self.plan.blocks.pages)
            progress = lax.fori_loop(0, blocks, do_block, progress)
            self.finish_tile(row, tile, progress.turn)
            return progress._replace(turn=progress.turn + 1)

        return lax.fori_loop(0, self.copies.tiles(row), do_tile, progress)

    def do_block(self, row: Scalar, tile: Scalar, block: Scalar, seen: Span, progress: Progress) -> Progress:
        """Starts the copy of a later block, waits for this one, and attends to it."""
        plan, slot = self.plan, progress.slot
        last_slot = plan.blocks.slots - 1
        free = jnp.where(slot == 0, last_slot, slot - 1)
        cursor = self.copies.fetch(progress.cursor, free)
        self.copies.wait(seen, block, slot)

        @pl.when(block == 0)
        def _() -> None:
            self.take_queries(slot)

        position = (seen.first_page + block * plan.blocks.pages) * plan.page_size
        end = seen.end - position
        if plan.decode:

            @pl.when(end <= plan.keys_in_block)
            def _() -> None:
                self.insert(row, seen, slot, end - 1, progress.turn)

        self.blank(slot, seen.low - position, end)
        chunks = divide_up(jnp.minimum(end, plan.keys_in_block), plan.blocks.keys)

        def do_chunk(chunk: Scalar, _: None) -> None:
            self.do_chunk(seen, slot, chunk, position + chunk * plan.blocks.keys)

        lax.fori_loop(0, chunks, do_chunk, None)
        return Progress(jnp.where(slot == last_slot, 0, slot + 1), progress.turn, cursor)

    def insert(self, row: Scalar, seen: Span, slot: Scalar, at: Scalar, turn: Scalar) -> None:
        """Puts a row's new key and value into row `at` of the block, and into its page."""
        plan, refs = self.plan, self.refs
        first = pl.multiple_of(at - remainder(at, plan.tile_rows), plan.tile_rows)
        shape = (plan.tile_rows // rows_in_word(plan.dtype), plan.lanes.row)
        mask = mask_rows(at - first, at - first + 1, shape, plan.dtype)

        @pl.when(turn > 0)
        def _() -> None:
            self.copies.patch_copy(jnp.zeros_like(row), jnp.zeros_like(row), turn).wait()

        for head in range(plan.kv_heads):
            top = head * plan.new_folds
            folds = [refs.new_slots[slot, pl.ds(top + i, 1)] for i in range(plan.new_folds)]
            new = jnp.broadcast_to(jnp.concatenate(folds, axis=1), shape)
            old = to_words(refs.kv_slots[slot, head, pl.ds(first, plan.tile_rows)])
            patched = from_words((old & ~mask) | (new & mask), plan.dtype)
            refs.kv_slots[slot, head, pl.ds(first, plan.tile_rows)] = patched
            refs.patches[turn & 1, head] = patched
        page_id = refs.page_table[row * plan.columns + divide(seen.first, plan.page_size)]
        in_page = remainder(seen.first, plan.page_size)
        self.copies.patch_copy(page_id, in_page - remainder(in_page, plan.tile_rows), turn).start()

    def blank(self, slot: Scalar, first: Scalar, end: Scalar) -> None:
        """Zeros the rows of a block that nobody sees: they may hold anything, NaN too, and 0 * NaN is NaN."""
        plan = self.plan

        @pl.when(end < plan.keys_in_block)
        def _() -> None:
            self.keep(slot, end - remainder(end, plan.tile_rows), 0, remainder(end, plan.tile_rows))
            self.zero(
                slot,
                divide_up(end, plan.tile_rows),
                divide_up(end, plan.blocks.keys) * (plan.blocks.keys // plan.tile_rows),
            )

        if plan.sliding_window is not None:

            @pl.when(first > 0)
            def _() -> None:
                self.keep(
                    slot,
                    first - remainder(first, plan.tile_rows),
                    remainder(first, plan.tile_rows),
                    plan.tile_rows,
                )
                self.zero(slot, 0, divide(first, plan.tile_rows))

    def keep(self, slot: Scalar, top: Scalar, first: Scalar | int, end: Scalar | int) -> None:
        """Zeros the tile of rows at `top`, if it is in the block, but for those from `first` to `end`."""
        plan, slots = self.plan, self.refs.kv_slots
        mask = mask_rows(first, end, (plan.tile_rows // rows_in_word(plan.dtype), plan.lanes.row), plan.dtype)

        @pl.when(top < plan.keys_in_block)
        def _() -> None:
            rows = pl.ds(pl.multiple_of(top, plan.tile_rows), plan.tile_rows)
            for head in range(plan.kv_heads):
                slots[slot, head, rows] = from_words(to_words(slots[slot, head, rows]) & mask, plan.dtype)

    def zero(self, slot: Scalar, first: Scalar | int, end: Scalar) -> None:
        """Zeros tiles of rows from `first` to `end`."""
        plan, slots = self.plan, self.refs.kv_slots
        words = jnp.zeros((plan.tile_rows // rows_in_word(plan.dtype), plan.lanes.row), jnp.int32)

        def zero_tile(i: Scalar, _: None) -> None:
            for head in range(plan.kv_heads):
                rows = pl.ds(pl.multiple_of(i * plan.tile_rows, plan.tile_rows), plan.tile_rows)
                slots[slot, head, rows] = from_words(words, plan.dtype)

        lax.fori_loop(first, end, zero_tile, None)

    def clear(self, turn: Scalar) -> None:
        """Begins a softmax: empty, or one that has seen its head's sink, a score with no value."""
        plan, refs = self.plan, self.refs
        refs.sums[...] = jnp.zeros_like(refs.sums)
        if refs.sinks is None:
            refs.top[...] = jnp.full_like(refs.top, MASKED)
            refs.total[...] = jnp.zeros_like(refs.total)
            return
        refs.total[...] = jnp.ones_like(refs.total)
        for head in range(plan.kv_heads):
            first = head * plan.group
            if plan.decode:
                refs.top[head] = refs.sinks[pl.ds(first, plan.matrix_rows)]
                continue
            for i, rows in enumerate(self.rows_of_heads()):
                sink = refs.sinks[pl.ds(first + i, 1)]
                refs.top[head, rows] = jnp.broadcast_to(sink, (plan.blocks.queries, LANES))

    def take_queries(self, slot: Scalar) -> None:
        """From tokens of heads to a matrix for each kv head: row `i * queries + t` is head i of token t."""
        plan, refs = self.plan, self.refs
        for head in range(plan.kv_heads):
            first = head * plan.group * plan.folds
            for fold in range(plan.folds):
                lanes = pl.ds(fold * LANES, LANES)
                if plan.decode:
                    rows = pl.ds(first + fold, plan.matrix_rows, stride=plan.folds)
                    refs.queries[head, :, lanes] = refs.q_slots[slot, rows].astype(plan.product)
                    continue
                for i, rows in enumerate(self.rows_of_heads()):
                    source = pl.ds(first + i * plan.folds + fold, plan.blocks.queries, stride=plan.query_rows)
                    refs.queries[head, rows, lanes] = refs.q_slots[slot, source].astype(plan.product)

    def do_chunk(self, seen: Span, slot: Scalar, chunk: Scalar, position: Scalar) -> None:
        """Attends to the keys from `position` on; without masks where all queries see all of them."""
        plan = self.plan
        if plan.decode:
            self.multiply(seen, slot, chunk, position, masked=True)
            return
        whole = position + plan.blocks.keys - 1 <= seen.first
        if plan.sliding_window is not None:
            whole &= position > seen.first + (plan.blocks.queries - 1 - plan.sliding_window)

        @pl.when(whole)
        def _() -> None:
            self.multiply(seen, slot, chunk, position, masked=False)

        @pl.when(~whole)
        def _() -> None:
            self.multiply(seen, slot, chunk, position, masked=True)

    def multiply(self, seen: Span, slot: Scalar, chunk: Scalar, position: Scalar, *, masked: bool) -> None:
        """One step of the online softmax for each kv head."""
        plan, refs = self.plan, self.refs
        keys = plan.blocks.keys
        rows = pl.ds(pl.multiple_of(chunk * keys, keys), keys)
        for head in range(plan.kv_heads):
            k = refs.kv_slots[slot, head, rows, 0 : plan.lanes.operand].astype(plan.product)
            if plan.lanes.shared:  # queries are zero in the value's lanes
                v = k
            else:
                v = refs.kv_slots[slot, head, rows, plan.lanes.values].astype(plan.product)
            scores = self.dot(refs.queries[head], k, contract=1)
            if plan.soft_cap is not None:
                scores = plan.soft_cap * jnp.tanh(scores * (1 / plan.soft_cap))
            if masked:
                scores = jnp.where(self.visible(seen, position, scores.shape), scores, MASKED)
            before = refs.top[head]
            top = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp(scores - top[:, :1])
            rescale = jnp.exp(before - top)
            refs.top[head] = top
            refs.total[head] = refs.total[head] * rescale + jnp.sum(weights, axis=1, keepdims=True)
            values = self.dot(weights.astype(plan.product), v, contract=0)
            refs.sums[head] = refs.sums[head] * rescale[:, :1] + values

    def dot(self, x: Array, y: Array, contract: int) -> Float[Array, "rows columns"]:
        """A product in float32; of float32, exact to its last bits."""
        exact = lax.Precision.HIGHEST if self.plan.product == jnp.float32 else None
        dimensions = (((1,), (contract,)), ((), ()))
        return lax.dot_general(x, y, dimensions, precision=exact, preferred_element_type=jnp.float32)

    def visible(self, seen: Span, position: Scalar, shape: tuple[int, ...]) -> Bool[Array, "rows keys"]:
        """Which keys from `position` on each query sees."""
        plan = self.plan
        key = position + lax.broadcasted_iota(jnp.int32, shape, 1)
        query = seen.first
        if not plan.decode:
            query = query + (lax.broadcasted_iota(jnp.int32, shape, 0) & (plan.blocks.queries - 1))
        visible = key <= query
        if plan.sliding_window is not None:
            visible &= key > query - plan.sliding_window
        return visible

    def finish_tile(self, row: Scalar, tile: Scalar, turn: Scalar) -> None:
        """Divides by the total, puts tokens and heads back in order and starts the copy to the output."""
        plan, refs = self.plan, self.refs
        for head in range(plan.kv_heads):
            result = refs.sums[head] / refs.total[head][:, :1]
            first = head * plan.group * plan.folds
            for fold in range(plan.folds):
                part = result[:, fold * LANES : (fold + 1) * LANES]
                if plan.decode:
                    rows = pl.ds(first + fold, plan.group, stride=plan.folds)
                    refs.results[turn & 1, rows] = part[: plan.group]
                    continue
                for i, source in enumerate(self.rows_of_heads()):
                    rows = pl.ds(first + i * plan.folds + fold, plan.blocks.queries, stride=plan.query_rows)
                    refs.results[turn & 1, rows] = part[source]

        @pl.when(turn > 0)  # tiles overlap, so they are written in their order
        def _() -> None:
            self.copies.result_copy(jnp.zeros_like(row), turn).wait()

        token = refs.query_start[row] + tile * plan.blocks.queries
        self.copies.result_copy(token, turn).start()

    def rows_of_heads(self) -> list[slice]:
        """The rows of each of a kv head's query heads in its matrix."""
        size = self.plan.blocks.queries
        return [slice(i * size, (i + 1) * size) for i in range(self.plan.group)]
