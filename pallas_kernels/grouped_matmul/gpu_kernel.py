"""The grouped product on Hopper: tiles of rows of one group, each with the columns of its weights.

As many thread blocks as the card runs at a time share out the tiles. In each, one warpgroup brings rows and
weights into shared memory with the copy engine, ahead of those that compute, from one tile into the next.
Each of these takes 64 outputs: it multiplies the transposed weights, as the operand of which wgmma takes 64
rows at least, with the transposed rows, of which it takes as few as 8: an expert has few in a decode step.

Beyond the edges of the weights the copy engine reads zeros. It would not begin a tile at any row: its boxes
are of 8 rows and a swizzle's columns, at multiples of these.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels._compat import transposed_ref
from pallas_kernels.grouped_matmul.gpu_plan import STEP, Plan
from pallas_kernels.hopper import ROWS, share_roles, swizzle_bytes, tiled


def multiply_tiles(
    x: BFloat16[Array, "tile_rows padded_in"],
    weights: BFloat16[Array, "groups in out"],
    group: Int32[Array, " tiles"],
    count: Int32[Array, " 1"],
    *,
    plan: Plan,
    out_dtype: DTypeLike,
    interpret: Any = None,
) -> Float[Array, "tile_rows padded_out"]:
    """The products of each tile of rows with the weights of its group, and zeros beyond their outputs.

    Args:
        x: one tile of `plan.rows` rows after the other, with zeros up to whole steps of inputs.
        group: of each tile.
        count: tiles that are computed; what the others come out as is not said.
        interpret: parameters of Mosaic GPU's interpreter, to run on the CPU.
    """
    columns, steps = plan.columns(weights.shape[2]), x.shape[1] // STEP
    operands = {"x": x, "weights": weights, "group": group, "count": count}
    itemsize = weights.dtype.itemsize
    swizzle = swizzle_bytes(weights.shape[2] * itemsize)
    scratch = scratch_types(plan, swizzle, out_dtype)

    def body(*refs: Any) -> None:
        named = dict(zip([*operands, "out", *scratch], refs, strict=True))
        _run(SimpleNamespace(**named), plan, columns, steps, swizzle // itemsize)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], columns * plan.outputs), out_dtype),
        scratch_types=list(scratch.values()),
        grid=(plan.blocks,),
        grid_names=("thread_block",),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        interpret=interpret,
    )(*operands.values())


def scratch_types(plan: Plan, swizzle: int, out_dtype: DTypeLike) -> dict[str, Any]:
    """Shared memory and barriers of a thread block, by name.

    Args:
        swizzle: bytes; whole ones of them make a row of weights.
    """
    return {
        "x_tile": tiled((plan.stages, plan.rows, STEP), jnp.bfloat16, swizzle),
        "weight_tile": tiled((plan.stages, plan.warpgroups, STEP, ROWS), jnp.bfloat16, swizzle),
        "result": tiled((plan.warpgroups, plan.stored, ROWS), out_dtype),
        "ready": plgpu.Barrier(num_arrivals=1 + plan.warpgroups, num_barriers=plan.stages),
        "empty": plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
    }


def _run(refs: Any, plan: Plan, columns: int, steps: int, run: int) -> None:
    """One warpgroup's part."""
    block, tiles = lax.axis_index("thread_block"), refs.count[0]
    mine = lax.div(tiles * columns - block + plan.blocks - 1, jnp.int32(plan.blocks))
    part = _Part(plan, refs, block, tiles, mine, columns, steps, run)
    share_roles(plan.warpgroups, plan.registers(), part.bring, part.compute)


@dataclass(frozen=True)
class _Part:
    """The work of a thread block.

    Attributes:
        tiles: of rows, of all thread blocks.
        count: of the results' tiles that this one computes.
        columns: tiles of results beside each other.
        steps: of each tile.
        run: inputs of one wgmma, as many as a swizzle is wide.
    """

    plan: Plan
    refs: Any
    block: Array
    tiles: Array
    count: Array
    columns: int
    steps: int
    run: int

    def bring(self) -> None:
        """Fills the stages that the computing warpgroups empty, then waits until the last ones are used."""
        stages = jnp.int32(self.plan.stages)

        def bring_tile(i: Array, carry: None) -> None:
            tile, output = self._locate(i)
            group = self.refs.group[tile]

            def fill(step: Array, carry: None) -> None:
                number = i * self.steps + step
                stage = lax.rem(number, stages)
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(self.refs.empty.at[stage]))
                self._copy(stage, group, tile * self.plan.rows, step * STEP, output)

            lax.fori_loop(0, self.steps, fill, None)

        lax.fori_loop(0, self.count, bring_tile, None)
        total = self.count * self.steps
        unused = jnp.minimum(total, stages)

        def drain(i: Array, carry: None) -> None:
            plgpu.barrier_wait(self.refs.empty.at[lax.rem(total - unused + i, stages)])

        lax.fori_loop(0, unused, drain, None)

    def _copy(self, stage: Array, group: Array, row: Array, first: Array, output: Array) -> None:
        """The inputs of a step: of the tile's rows, and of the columns of each computing warpgroup."""
        refs, ready, inputs = self.refs, self.refs.ready.at[stage], pl.ds(first, STEP)
        plgpu.copy_gmem_to_smem(refs.x.at[pl.ds(row, self.plan.rows), inputs], refs.x_tile.at[stage], ready)
        for warpgroup in range(self.plan.warpgroups):
            columns = pl.ds(output + warpgroup * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(
                refs.weights.at[group, inputs, columns], refs.weight_tile.at[stage, warpgroup], ready
            )

    def compute(self, warpgroup: Array) -> None:
        """Sums this warpgroup's outputs of each tile and writes them."""

        def compute_tile(i: Array, carry: None) -> None:
            total = pl.run_scoped(
                lambda total: self._sum(total, i * self.steps, warpgroup),
                plgpu.ACC((ROWS, self.plan.rows), jnp.float32),  # pyright: ignore[reportPrivateImportUsage]
            )
            tile, output = self._locate(i)
            self._store(total, tile * self.plan.rows, output + warpgroup * ROWS, warpgroup)

        lax.fori_loop(0, self.count, compute_tile, None)
        plgpu.wait_smem_to_gmem(0)

    def _sum(self, total: Any, before: Array, warpgroup: Array) -> Array:
        """A tile's products; `before` counts the steps of the tiles before it.

        The tensor cores work on a step while the next is waited for; only then its stage is free.
        """
        refs, stages = self.refs, jnp.int32(self.plan.stages)

        def multiply(step: Array, carry: None) -> None:
            stage = lax.rem(before + step, stages)
            plgpu.barrier_wait(refs.ready.at[stage])
            for first in range(0, STEP, self.run):
                run = pl.ds(first, self.run)
                plgpu.wgmma(
                    total,
                    transposed_ref(refs.weight_tile.at[stage, warpgroup, run]),
                    transposed_ref(refs.x_tile.at[stage, :, run]),
                )
            plgpu.wgmma_wait(STEP // self.run)
            last = lax.rem(before + step - 1, stages)
            pl.when(step > 0)(lambda: plgpu.barrier_arrive(refs.empty.at[last]))

        lax.fori_loop(0, self.steps, multiply, None)
        found = total[...]
        plgpu.barrier_arrive(refs.empty.at[lax.rem(before + self.steps - 1, stages)])
        return found

    def _store(self, total: Array, row: Array, output: Array, warpgroup: Array) -> None:
        """Writes a tile's results, transposed, some rows at a time."""
        result = self.refs.result.at[warpgroup]
        for first in range(0, self.plan.rows, self.plan.stored):
            some = lax.slice(total, (0, first), (ROWS, first + self.plan.stored)).astype(result.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            transposed_ref(result)[...] = plgpu.layout_cast(some, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            rows = pl.ds(row + first, self.plan.stored)
            plgpu.copy_smem_to_gmem(result, self.refs.out.at[rows, pl.ds(output, ROWS)])

    def _locate(self, i: Array) -> tuple[Array, Array]:
        """The tile of rows of this thread block's i-th tile of results, and its first output.

        Panels of some columns are taken one after the other, and in each all rows.
        """
        number, panel = self.block + i * self.plan.blocks, self.plan.panel(self.columns)
        before, rest = lax.div(number, self.tiles * panel), lax.rem(number, self.tiles * panel)
        column = before * panel + lax.rem(rest, jnp.int32(panel))
        return lax.div(rest, jnp.int32(panel)), column * self.plan.outputs
