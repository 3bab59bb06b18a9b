"""The product with quantized weights on Hopper: each tile's weights are widened in shared memory.

One warpgroup brings values, tokens and scales into shared memory with the copy engine, ahead of those that
compute. Each of these takes 64 outputs: it widens its columns of the values to bfloat16, and multiplies their
transpose, as the operand of which wgmma takes 64 rows at least, with the transposed tokens, of which it takes
as few as 8 (the swapped operands of CUTLASS's mixed-input products). While one widens the tensor cores work
for another. A tile's inputs can be divided over several thread blocks, whose results XLA adds.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Shaped

from pallas_kernels._compat import load_registers, transposed_ref
from pallas_kernels.hopper import ROWS, share_roles, tiled
from pallas_kernels.quant_matmul.gpu_plan import STEP, Plan, Weights

MATRIX = plgpu.Layout.WGMMA
PER_OUTPUT = plgpu.Layout.WGMMA.reduce(1)
PER_TOKEN = plgpu.Layout.WGMMA.reduce(0)


def multiply_tiles(
    x: BFloat16[Array, "tokens in"],
    values: Shaped[Array, "rows out"],
    scale: Float32[Array, "groups out"],
    zero: Float32[Array, "groups out"] | None,
    per_token: Float32[Array, "chunks tokens"] | None,
    *,
    plan: Plan,
    weights: Weights,
    out_dtype: Any,
    interpret: Any = None,
) -> Float[Array, "splits tokens out"]:
    """The sums of each split.

    Args:
        x: whole tiles of tokens; with packed values in each step the even inputs before the odd ones, these
            divided by 16.
        per_token: with zeros the sum of each chunk's inputs; else what a chunk's product is multiplied with.
            Without groups there is one chunk.
        interpret: parameters of Mosaic GPU's interpreter, to run on the CPU.
    """
    tokens, inputs = x.shape
    outputs = values.shape[1]
    tiles = tokens // plan.tokens, outputs // plan.outputs
    named = {"scale": scale, "zero": zero, "per_token": per_token}
    operands = {"x": x, "values": values} | {name: a for name, a in named.items() if a is not None}
    scratch = scratch_types(plan, weights, values.dtype, out_dtype)

    def body(*refs: Any) -> None:
        names = [*operands, "out", *scratch]
        _run(SimpleNamespace(**dict(zip(names, refs, strict=True))), plan, weights, tiles, inputs // STEP)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.splits, tokens, outputs), out_dtype),
        scratch_types=list(scratch.values()),
        grid=(tiles[0] * tiles[1] * plan.splits,),
        grid_names=("thread_block",),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        interpret=interpret,
    )(*operands.values())


def scratch_types(plan: Plan, weights: Weights, values: Any, out_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a thread block, by name."""
    rows = STEP // 2 if weights.packed else STEP
    swizzle = 2 * weights.run  # wgmma takes as many inputs at a time as a swizzle is wide
    scratch = {
        "x_tile": tiled((plan.stages, plan.tokens, STEP), jnp.bfloat16, swizzle),
        "narrow": tiled((plan.stages, rows, plan.outputs), values, ROWS),
        "wide": tiled((plan.warpgroups, STEP, ROWS), jnp.bfloat16, swizzle),
        "result": tiled((plan.warpgroups, plan.stored, ROWS), out_dtype),
        "ready": plgpu.Barrier(num_arrivals=2 + _extra_copies(weights), num_barriers=plan.stages),
        "empty": plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
    }
    if weights.grouped:
        groups, chunks = max(1, STEP // (weights.scale_rows or STEP)), STEP // weights.chunk
        scratch["scale_tile"] = plgpu.SMEM((plan.stages, groups, plan.outputs), jnp.float32)
        if weights.zero:
            scratch["zero_tile"] = plgpu.SMEM((plan.stages, groups, plan.outputs), jnp.float32)
        if weights.per_token:
            scratch["token_tile"] = plgpu.SMEM((plan.stages, chunks, plan.tokens), jnp.float32)
    return scratch


def _extra_copies(weights: Weights) -> int:
    """Of scales and the like, for each step."""
    return 1 + weights.zero + weights.per_token if weights.grouped else 0


def _run(refs: Any, plan: Plan, weights: Weights, tiles: tuple[int, int], steps: int) -> None:
    """One warpgroup's part."""
    block = lax.axis_index("thread_block")
    split, rest = lax.rem(block, jnp.int32(plan.splits)), lax.div(block, jnp.int32(plan.splits))
    token = lax.rem(rest, jnp.int32(tiles[0])) * plan.tokens  # one after the other, the weight in the L2
    output = lax.div(rest, jnp.int32(tiles[0])) * plan.outputs
    low = lax.div(split * steps, jnp.int32(plan.splits))
    high = lax.div((split + 1) * steps, jnp.int32(plan.splits))
    part = _Part(plan, weights, refs, split, token, output, low, high)
    share_roles(plan.warpgroups, plan.registers(), part.bring, part.compute)


@dataclass(frozen=True)
class _Part:
    """The work of a thread block: the steps low <= step < high of a tile."""

    plan: Plan
    weights: Weights
    refs: Any
    split: Array
    token: Array
    output: Array
    low: Array
    high: Array

    def bring(self) -> None:
        """Fills the stages that the computing warpgroups empty, then waits until the last ones are used."""
        stages = jnp.int32(self.plan.stages)

        def fill(step: Array, carry: None) -> None:
            stage = lax.rem(step - self.low, stages)
            pl.when(step - self.low >= stages)(lambda: plgpu.barrier_wait(self.refs.empty.at[stage]))
            self._copy(step, stage)

        lax.fori_loop(self.low, self.high, fill, None)
        unused = jnp.minimum(self.high - self.low, stages)

        def drain(i: Array, carry: None) -> None:
            plgpu.barrier_wait(self.refs.empty.at[lax.rem(self.high - self.low - unused + i, stages)])

        lax.fori_loop(0, unused, drain, None)

    def _copy(self, step: Array, stage: Array) -> None:
        refs, ready = self.refs, self.refs.ready.at[stage]
        tokens, outputs = pl.ds(self.token, self.plan.tokens), pl.ds(self.output, self.plan.outputs)
        rows = STEP // 2 if self.weights.packed else STEP
        plgpu.copy_gmem_to_smem(refs.x.at[tokens, pl.ds(step * STEP, STEP)], refs.x_tile.at[stage], ready)
        plgpu.copy_gmem_to_smem(
            refs.values.at[pl.ds(step * rows, rows), outputs], refs.narrow.at[stage], ready
        )
        if not self.weights.grouped:
            return
        scale_rows = self.weights.scale_rows
        groups = max(1, STEP // (scale_rows or STEP))
        first = lax.div(step * STEP, jnp.int32(scale_rows)) if scale_rows else jnp.int32(0)
        group = pl.ds(first, groups)
        plgpu.copy_gmem_to_smem(refs.scale.at[group, outputs], refs.scale_tile.at[stage], ready)
        if self.weights.zero:
            plgpu.copy_gmem_to_smem(refs.zero.at[group, outputs], refs.zero_tile.at[stage], ready)
        if self.weights.per_token:
            chunks = STEP // self.weights.chunk
            chunk = pl.ds(step * chunks, chunks)
            plgpu.copy_gmem_to_smem(refs.per_token.at[chunk, tokens], refs.token_tile.at[stage], ready)

    def compute(self, warpgroup: Array) -> None:
        """Sums this warpgroup's outputs and writes them."""
        refs = self.refs

        def step(step: Array, total: Array) -> Array:
            stage = lax.rem(step - self.low, jnp.int32(self.plan.stages))
            plgpu.barrier_wait(refs.ready.at[stage])
            self._widen(warpgroup, stage)
            plgpu.commit_smem()  # for wgmma, and for the copy that overwrites what was read
            total = self._add(warpgroup, stage, total)
            plgpu.barrier_arrive(refs.empty.at[stage])
            return total

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, self.plan.tokens), jnp.float32), MATRIX)
        total = lax.fori_loop(self.low, self.high, step, zeros)
        outputs = pl.ds(self.output + warpgroup * ROWS, ROWS)
        if not self.weights.grouped:
            total = total * self._per_output(refs.scale.at[0, outputs])
            if self.weights.per_token:
                tokens = pl.ds(self.token, self.plan.tokens)
                total = total * self._per_token(refs.per_token.at[0, tokens])
        self._store(refs.result.at[warpgroup], total, outputs)

    def _store(self, result: Any, total: Array, outputs: Any) -> None:
        """Writes the sums, transposed, some tokens at a time."""
        for first in range(0, self.plan.tokens, self.plan.stored):
            some = lax.slice(total, (0, first), (ROWS, first + self.plan.stored)).astype(result.dtype)
            if first > 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            transposed_ref(result)[...] = plgpu.layout_cast(some, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            tokens = pl.ds(self.token + first, self.plan.stored)
            plgpu.copy_smem_to_gmem(result, self.refs.out.at[self.split, tokens, outputs])
        plgpu.wait_smem_to_gmem(0)

    def _widen(self, warpgroup: Array, stage: Array) -> None:
        """This warpgroup's columns of the values, to bfloat16; of packed ones the even inputs come first."""
        columns = pl.ds(warpgroup * ROWS, ROWS)
        wide = self.refs.wide.at[warpgroup]
        for first in range(0, STEP // 2 if self.weights.packed else STEP, ROWS):
            part = self.refs.narrow.at[stage, pl.ds(first, ROWS), columns]
            narrow = load_registers(part, plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
            if narrow.dtype == jnp.float8_e4m3fn:  # the hardware makes it float16 only
                wide[pl.ds(first, ROWS)] = _as_matrix(narrow.astype(jnp.float16).astype(jnp.float32))
            elif not self.weights.packed:
                wide[pl.ds(first, ROWS)] = _as_matrix(narrow)
            else:  # exact, and without shifts, which take bytes one by one
                low = ((narrow ^ jnp.int8(8)) & jnp.int8(15)).astype(jnp.bfloat16) - jnp.bfloat16(8)
                wide[pl.ds(first, ROWS)] = _as_matrix(low)
                wide[pl.ds(first + ROWS, ROWS)] = _as_matrix(narrow & jnp.int8(-16))

    def _add(self, warpgroup: Array, stage: Array, total: Array) -> Array:
        """Adds the products of a step."""
        runs = range(0, STEP, self.weights.run)
        if not self.weights.grouped:
            start: Any = plgpu.ACC.init(total)  # pyright: ignore[reportPrivateImportUsage]

            def multiply(product: Any) -> None:
                for first in runs:
                    self._multiply(product, warpgroup, stage, first)

            return cast(Array, pl.run_state(multiply)(start))
        for chunk in range(STEP // self.weights.chunk):
            total = total + self._scaled(warpgroup, stage, chunk)
        return total

    def _scaled(self, warpgroup: Array, stage: Array, chunk: int) -> Array:
        """The product of a chunk, times its scale."""
        refs, weights = self.refs, self.weights
        halves = (0, ROWS) if weights.packed else (0,)
        length = weights.chunk // len(halves)

        def multiply(product: Any) -> Array:
            for half in halves:
                for first in range(chunk * length, (chunk + 1) * length, weights.run):
                    self._multiply(product, warpgroup, stage, half + first)
            return product[...]

        shape = (ROWS, self.plan.tokens)
        product = pl.run_scoped(
            multiply,
            plgpu.ACC(shape, jnp.float32),  # pyright: ignore[reportPrivateImportUsage]
        )
        outputs = pl.ds(warpgroup * ROWS, ROWS)
        group = chunk if weights.scale_rows else 0
        if weights.per_token:
            per_token = self._per_token(refs.token_tile.at[stage, chunk])
            if weights.zero:
                product = product - self._per_output(refs.zero_tile.at[stage, group, outputs]) * per_token
            else:
                product = product * per_token
        return product * self._per_output(refs.scale_tile.at[stage, group, outputs])

    def _multiply(self, product: Any, warpgroup: Array, stage: Array, first: int) -> None:
        """Adds the product of some inputs."""
        run = pl.ds(first, self.weights.run)
        plgpu.wgmma(
            product,
            transposed_ref(self.refs.wide.at[warpgroup, run]),
            transposed_ref(self.refs.x_tile.at[stage, :, run]),
        )

    def _per_output(self, ref: Any) -> Array:
        row = load_registers(ref, PER_OUTPUT, optimized=False)
        return lax.broadcast_in_dim(row, (ROWS, self.plan.tokens), [0])

    def _per_token(self, ref: Any) -> Array:
        column = load_registers(ref, PER_TOKEN, optimized=False)
        return lax.broadcast_in_dim(column, (ROWS, self.plan.tokens), [1])


def _as_matrix(x: Array) -> Array:
    return plgpu.layout_cast(x.astype(jnp.bfloat16), MATRIX)
