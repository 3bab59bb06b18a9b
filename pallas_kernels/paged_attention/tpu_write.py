"""The TPU kernel that writes the keys and values of rows with several new tokens into their pages.

Page by page: the page's new tokens are loaded head by head, packed, and the page goes out in one copy. Of a
page that the new tokens do not fill, the old rows are read before. Copies run ahead and behind, as in
`tpu_attend`. Rows of one token are written by the kernel that attends to them, which has their page at hand.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, Shaped

from pallas_kernels.paged_attention.batch import RaggedBatch
from pallas_kernels.paged_attention.tpu_blocks import WRITE_SLOTS as SLOTS
from pallas_kernels.paged_attention.tpu_blocks import vmem_limit, write_bytes
from pallas_kernels.paged_attention.tpu_layout import LANES
from pallas_kernels.paged_attention.tpu_packed import (
    bits_of_row,
    from_words,
    mask_rows,
    rows_in_word,
    to_words,
)
from pallas_kernels.paged_attention.tpu_plan import Plan, Scalar, divide, divide_up

AHEAD = 2
"""Pages whose copies are started before their turn; so many that the rest are being written."""


class Cursor(NamedTuple):
    """The next page to copy: its row, and its column in the row's table."""

    row: Scalar
    column: Scalar


class Extent(NamedTuple):
    """The positions of a row's new tokens."""

    first: Scalar
    end: Scalar


@dataclass(frozen=True)
class Write:
    """The kernel's body."""

    plan: Plan
    query_start: Any
    kv_lens: Any
    page_table: Any
    num_rows: Any
    new: Any
    pages: Any
    new_slots: Any
    page_slots: Any
    new_fetched: Any
    old_fetched: Any
    written: Any

    def run(self) -> None:
        """Writes the tokens of all rows after those of one token."""
        first_row, end_row = self.num_rows[0], self.num_rows[1]
        cursor = Cursor(first_row, self.first_column(first_row))
        for unit in range(AHEAD):
            cursor = self.fetch(cursor, jnp.int32(unit))

        def do_row(row: Scalar, carry: tuple[Scalar, Cursor]) -> tuple[Scalar, Cursor]:
            def do_page(column: Scalar, carry: tuple[Scalar, Cursor]) -> tuple[Scalar, Cursor]:
                unit, cursor = carry

                @pl.when(unit >= SLOTS - AHEAD)
                def _() -> None:
                    self.page_copy(jnp.zeros_like(unit), unit + AHEAD).wait()

                cursor = self.fetch(cursor, unit + AHEAD)
                self.do_page(row, column, unit)
                return unit + 1, cursor

            extent = self.extent(row)
            columns = divide_up(extent.end, self.plan.page_size)
            return lax.fori_loop(divide(extent.first, self.plan.page_size), columns, do_page, carry)

        units, _ = lax.fori_loop(first_row, end_row, do_row, (jnp.zeros_like(first_row), cursor))

        def drain(unit: Scalar, _: None) -> None:
            self.page_copy(jnp.zeros_like(unit), unit).wait()

        lax.fori_loop(jnp.maximum(units - (SLOTS - AHEAD), 0), units, drain, None)

    def extent(self, row: Scalar) -> Extent:
        """Where the new tokens of a row go."""
        end = self.kv_lens[row]
        return Extent(end - (self.query_start[row + 1] - self.query_start[row]), end)

    def first_column(self, row: Scalar) -> Scalar:
        """The first page that a row writes to."""
        row = jnp.minimum(row, self.kv_lens.shape[0] - 1)
        return divide(self.extent(row).first, self.plan.page_size)

    def filled(self, extent: Extent, column: Scalar) -> tuple[Scalar, Scalar]:
        """The rows of a page that new tokens fill."""
        position = column * self.plan.page_size
        first = jnp.maximum(extent.first - position, 0)
        return first, jnp.minimum(extent.end - position, self.plan.page_size)

    def fetch(self, cursor: Cursor, unit: Scalar) -> Cursor:
        """Starts the copies of the cursor's page, if there is one, and returns the cursor after it."""
        row = jnp.minimum(cursor.row, self.kv_lens.shape[0] - 1)
        extent = self.extent(row)
        first, end = self.filled(extent, cursor.column)

        @pl.when(cursor.row < self.num_rows[1])
        def _() -> None:
            token = self.query_start[row] + cursor.column * self.plan.page_size - extent.first
            self.new_copy(token, unit).start()

            @pl.when(end - first < self.plan.page_size)
            def _() -> None:
                page_id = self.page_table[row * self.plan.columns + cursor.column]
                self.old_copy(page_id, unit).start()

        in_row = (cursor.column + 1) * self.plan.page_size < extent.end
        after = Cursor(row + 1, self.first_column(row + 1))
        return Cursor(
            jnp.where(in_row, cursor.row, cursor.row + 1),
            jnp.where(in_row, cursor.column + 1, after.column),
        )

    def do_page(self, row: Scalar, column: Scalar, unit: Scalar) -> None:
        """Packs a page's new tokens and starts its copy to the pool."""
        plan, slot = self.plan, unit & (SLOTS - 1)
        first, end = self.filled(self.extent(row), column)
        self.new_copy(jnp.zeros_like(row), unit).wait()

        @pl.when(end - first < plan.page_size)
        def _() -> None:
            self.old_copy(jnp.zeros_like(row), unit).wait()

        shape = (plan.page_size // rows_in_word(plan.dtype), LANES)
        mask = mask_rows(first, end, shape, plan.dtype)
        for head in range(plan.kv_heads):
            for fold in range(plan.new_folds):
                lanes = pl.ds(fold * LANES, LANES)
                old = to_words(self.page_slots[slot, head, :, lanes])
                new = self.pack(slot, head * plan.new_folds + fold, shape[0])
                words = (old & ~mask) | (new & mask)
                self.page_slots[slot, head, :, lanes] = from_words(words, plan.dtype)
        self.page_copy(self.page_table[row * plan.columns + column], unit).start()

    def pack(self, slot: Scalar, fold: int, count: int) -> Int32[Array, "words 128"]:
        """128 lanes of a page's new tokens as words."""
        plan = self.plan
        per_word = rows_in_word(plan.dtype)
        words = jnp.zeros((count, LANES), jnp.int32)
        for i in range(per_word):
            rows = pl.ds(i * plan.new_rows + fold, count, stride=per_word * plan.new_rows)
            words |= self.new_slots[slot, rows] & bits_of_row(i, plan.dtype)
        return words

    def new_copy(self, token: Scalar, unit: Scalar) -> Any:
        """The keys and values of a page's tokens from `token` on, which may be before the row's first."""
        rows, slot = self.plan.new_rows, unit & (SLOTS - 1)
        token = token + self.plan.page_size  # see `new_rows`
        source = self.new.at[pl.ds(pl.multiple_of(token * rows, rows), self.plan.page_size * rows)]
        return pltpu.make_async_copy(source, self.new_slots.at[slot], self.new_fetched.at[slot])

    def old_copy(self, page_id: Scalar, unit: Scalar) -> Any:
        """A page as it was."""
        slot = unit & (SLOTS - 1)
        return pltpu.make_async_copy(
            self.pages.at[page_id], self.page_slots.at[slot], self.old_fetched.at[slot]
        )

    def page_copy(self, page_id: Scalar, unit: Scalar) -> Any:
        """A page as it is to be."""
        slot = unit & (SLOTS - 1)
        return pltpu.make_async_copy(self.page_slots.at[slot], self.pages.at[page_id], self.written.at[slot])


def write_rows(
    plan: Plan,
    new: Int32[Array, "tokens*rows 128"],
    pages: Shaped[Array, "pages kv_heads page_size lanes"],
    batch: RaggedBatch,
    *,
    device_kind: str,
    interpret: Any,
) -> Shaped[Array, "pages kv_heads page_size lanes"]:
    """The pages with the keys and values of all rows but those of one token, written in place."""

    names = ("query_start", "kv_lens", "page_table", "num_rows", "new", "pages", "pages", "new_slots",
             "page_slots", "new_fetched", "old_fetched", "written")  # fmt: skip

    def body(*refs: Any) -> None:
        # of the pages, which are argument and result, the result stands
        Write(plan=plan, **dict(zip(names, refs, strict=True))).run()

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    scalars = (batch.query_start, batch.kv_lens, batch.page_table.reshape(-1), batch.num_rows)
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((SLOTS, plan.page_size * plan.new_rows, LANES), jnp.int32),
                pltpu.VMEM((SLOTS, *pages.shape[1:]), pages.dtype),
                *[pltpu.SemaphoreType.DMA((SLOTS,))] * 3,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        input_output_aliases={len(scalars) + 1: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_limit(write_bytes(plan), device_kind)),
        interpret=interpret,
        name="write_pages",
    )(*scalars, new, pages)
