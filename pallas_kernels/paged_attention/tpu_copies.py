"""The copies of the TPU kernel that attends: what comes to VMEM ahead of its use, and what goes back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.tpu_plan import Plan, Scalar, Span, divide_up, span


class Cursor(NamedTuple):
    """The next block to copy."""

    row: Scalar
    tile: Scalar
    block: Scalar


@dataclass(frozen=True)
class Refs:
    """The kernel's arguments and buffers."""

    query_start: Any
    kv_lens: Any
    page_table: Any
    num_rows: Any
    q: Any
    pages: Any
    out: Any
    kv_slots: Any
    q_slots: Any
    queries: Any
    top: Any
    total: Any
    sums: Any
    results: Any
    fetched: Any
    stored: Any
    sinks: Any = None
    new: Any = None
    new_slots: Any = None
    patches: Any = None
    patched: Any = None


@dataclass(frozen=True)
class Copies:
    """Starts and awaits them, for rows up to `end_row`."""

    plan: Plan
    refs: Refs
    end_row: Scalar

    def span(self, row: Scalar, tile: Scalar) -> Span:
        """What a tile of a row sees."""
        starts = self.refs.query_start
        return span(self.plan, starts[row], starts[row + 1], self.refs.kv_lens[row], tile)

    def tiles(self, row: Scalar) -> Scalar:
        """Tiles of a row."""
        starts = self.refs.query_start
        return divide_up(starts[row + 1] - starts[row], self.plan.blocks.queries)

    def fetch(self, cursor: Cursor, slot: Scalar) -> Cursor:
        """Starts the copies of the cursor's block, if there is one, and returns the cursor after it."""
        most = self.plan.blocks.pages
        row = jnp.minimum(cursor.row, self.refs.kv_lens.shape[0] - 1)
        seen = self.span(row, cursor.tile)
        first = cursor.block * most

        @pl.when(cursor.row < self.end_row)
        def _() -> None:
            column = row * self.plan.columns + seen.first_page + first

            def start(page: Scalar | int) -> None:
                self.page_copy(self.refs.page_table[column + page], page, slot).start()

            for_each(jnp.minimum(seen.pages - first, most), most, start)

            @pl.when(cursor.block == 0)
            def _() -> None:
                token = self.refs.query_start[row] + cursor.tile * self.plan.blocks.queries
                self.query_copy(token, slot).start()

            if self.plan.decode:

                @pl.when(first + most >= seen.pages)
                def _() -> None:
                    self.new_copy(self.refs.query_start[row], slot).start()

        in_tile = first + most < seen.pages
        in_row = in_tile | (cursor.tile + 1 < self.tiles(row))
        tile = jnp.where(in_tile, cursor.tile, jnp.where(in_row, cursor.tile + 1, 0))
        return Cursor(
            jnp.where(in_row, cursor.row, cursor.row + 1), tile, jnp.where(in_tile, cursor.block + 1, 0)
        )

    def wait(self, seen: Span, block: Scalar, slot: Scalar) -> None:
        """Until what `fetch` started for a block is there."""
        zero, most = jnp.zeros_like(slot), self.plan.blocks.pages
        first = block * most
        for_each(
            jnp.minimum(seen.pages - first, most), most, lambda page: self.page_copy(zero, page, slot).wait()
        )

        @pl.when(block == 0)
        def _() -> None:
            self.query_copy(zero, slot).wait()

        if self.plan.decode:

            @pl.when(first + most >= seen.pages)
            def _() -> None:
                self.new_copy(zero, slot).wait()

    def page_copy(self, page_id: Scalar, page: Scalar | int, slot: Scalar) -> Any:
        """A page to its place in a block."""
        size = self.plan.page_size
        first = page * size if isinstance(page, int) else pl.multiple_of(page * size, size)
        place = self.refs.kv_slots.at[slot, :, pl.ds(first, size)]
        return pltpu.make_async_copy(self.refs.pages.at[page_id], place, self.refs.fetched.at[slot])

    def query_copy(self, token: Scalar, slot: Scalar) -> Any:
        """A tile's queries, and those of the tokens after them."""
        rows, tokens = self.plan.query_rows, self.plan.blocks.queries
        source = self.refs.q.at[pl.ds(pl.multiple_of(token * rows, rows), tokens * rows)]
        place = self.refs.q_slots.at[slot, pl.ds(0, tokens * rows)]
        return pltpu.make_async_copy(source, place, self.refs.fetched.at[slot])

    def new_copy(self, token: Scalar, slot: Scalar) -> Any:
        """The key and value of a row's new token."""
        rows = self.plan.new_rows
        token = token + self.plan.page_size  # see `new_rows`
        source = self.refs.new.at[pl.ds(pl.multiple_of(token * rows, rows), rows)]
        return pltpu.make_async_copy(source, self.refs.new_slots.at[slot], self.refs.fetched.at[slot])

    def patch_copy(self, page_id: Scalar, first: Scalar, turn: Scalar) -> Any:
        """A tile of rows of each head, one of them new, back to their page."""
        size = self.plan.tile_rows
        rows = pl.ds(pl.multiple_of(first, size), size)
        place = self.refs.pages.at[page_id, :, rows]
        return pltpu.make_async_copy(self.refs.patches.at[turn & 1], place, self.refs.patched)

    def result_copy(self, token: Scalar, turn: Scalar) -> Any:
        """A tile's results to the output; past its row's end it writes over what is written next."""
        rows, tokens = self.plan.query_rows, self.plan.blocks.queries
        place = self.refs.out.at[pl.ds(pl.multiple_of(token * rows, rows), tokens * rows)]
        return pltpu.make_async_copy(self.refs.results.at[turn & 1], place, self.refs.stored)


def for_each(count: Scalar, most: int, do: Callable[[Scalar | int], None]) -> None:
    """`do` for 0 up to `count`, without a loop where that is all of `most`."""

    @pl.when(count == most)
    def _() -> None:
        for i in range(most):
            do(i)

    @pl.when(count < most)
    def _() -> None:
        lax.fori_loop(0, count, lambda i, _: do(i), None)
