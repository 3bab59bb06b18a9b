"""The grouped product on TPU: a Pallas kernel that visits each tile of rows once for each group in it.

Grid: tiles of `out`, then the items of `cut_tiles`, then tiles of `in`. The number of items is data, so that
the work is that of the rows there are. An output tile stays in VMEM while consecutive items write their rows
of it. Source of the scheme: https://arxiv.org/abs/2211.15841.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels._compat import raise_on_races, tpu_interpreter
from pallas_kernels.devices import current_device
from pallas_kernels.grouped_matmul.backend import Backend
from pallas_kernels.grouped_matmul.problem import Problem
from pallas_kernels.grouped_matmul.tiles import cut_tiles, from_bits, mesh_axes
from pallas_kernels.tuning import Tunable, lookup

LANES = 128
LARGEST_BLOCK = 1024
"""Of `in` and `out`: a block of weights in bfloat16 is then 2 MiB, in float32 (512 outputs) as well."""
MOST_ROWS = 512
"""Of a tile: up to 240 (v5e) to 574 (v6e) rows of bfloat16 the time goes into reading the weights."""
PHASE = "product"
TUNABLE = {
    "rows": (16, 32, 64, 128, 256, 512),
    "inputs": (512, 1024, 2048),
    "outputs": (256, 512, 1024, 2048),
}
"""What `tuning.json` may choose: rows of a tile, and the most inputs and outputs."""
DTYPES = (jnp.float32, jnp.bfloat16)


class Blocks(NamedTuple):
    """Sizes of the blocks that are in VMEM at once."""

    rows: int
    inputs: int
    outputs: int


def default_blocks(tokens: int, groups: int, inputs: int, outputs: int, itemsize: int) -> Blocks:
    """Tiles of as many rows as a group has on average, within 16 and 512, and at most 14 MiB in VMEM."""
    rows = 16
    while rows < MOST_ROWS and rows * groups < tokens:
        rows *= 2
    return Blocks(rows, _block(inputs, LARGEST_BLOCK), _block(outputs, LARGEST_BLOCK * 2 // itemsize))


def tuned_blocks(problem: Problem) -> Blocks | None:
    """What was measured on the problem's chip; None: nothing was.

    Raises:
        ValueError: see `lookup`.
    """
    key = {"phase": PHASE, **problem.tuning_key}
    found = lookup("grouped_matmul", "tpu", problem.device_kind, key, TUNABLE)
    return None if found is None else as_blocks(problem, found)


def as_blocks(problem: Problem, numbers: dict[str, int]) -> Blocks:
    """From what `TUNABLE` names."""
    inputs, outputs = _block(problem.inputs, numbers["inputs"]), _block(problem.outputs, numbers["outputs"])
    return Blocks(numbers["rows"], inputs, outputs)


def grouped_matmul_tpu(
    x: Float[Array, "tokens in"],
    weights: Shaped[Array, "groups in out"],
    group_sizes: Int[Array, " groups"],
    /,
    *,
    out_dtype: DTypeLike,
    blocks: Blocks | dict[str, int] | None = None,
    interpret: Any = False,
) -> Float[Array, "tokens out"]:
    """See `grouped_matmul`.

    Args:
        blocks: rows are a multiple of 16, inputs and outputs of 128 or the whole axis; or a dictionary with
            what `TUNABLE` names; None: tuned for this chip, or the default.
        interpret: parameters of the TPU interpreter.
    """
    weights = from_bits(weights)
    dtype = jnp.promote_types(x.dtype, weights.dtype)
    tokens, inputs = x.shape
    groups, _, outputs = weights.shape
    problem = Problem(
        "tpu", "" if interpret else current_device()[1], tokens, groups, inputs, outputs, jnp.dtype(x.dtype),
        jnp.dtype(weights.dtype), jnp.dtype(out_dtype),
    )  # fmt: skip
    if isinstance(blocks, dict):
        blocks = as_blocks(problem, blocks)
    blocks = (
        blocks
        or tuned_blocks(problem)
        or default_blocks(tokens, groups, inputs, outputs, jnp.dtype(dtype).itemsize)
    )
    tiles = cut_tiles(group_sizes, tokens, blocks.rows, aligned=True)
    steps = pl.cdiv(inputs, blocks.inputs)

    # Items without a group read nothing: they stay at the blocks that are there.
    def step_of(item: Any, step: Any, counts: Any) -> Any:
        return jnp.where(item < counts[0], step, steps - 1)

    def rows_at(column: Any, item: Any, step: Any, group: Any, start: Any, first: Any, end: Any, counts: Any):
        return lax.div(start[item], jnp.int32(blocks.rows)), step_of(item, step, counts)

    def weights_at(column: Any, item: Any, step: Any, group: Any, *rest: Any):
        return group[item], step_of(item, step, rest[-1]), column

    def out_at(column: Any, item: Any, step: Any, group: Any, start: Any, *rest: Any):
        return lax.div(start[item], jnp.int32(blocks.rows)), column

    return pl.pallas_call(
        partial(_kernel, blocks=blocks, inputs=inputs, dtype=dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tiles),
            grid=(pl.cdiv(outputs, blocks.outputs), tiles.counts[1], steps),
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.inputs), rows_at),
                pl.BlockSpec((1, blocks.inputs, blocks.outputs), weights_at),
            ],
            out_specs=pl.BlockSpec((blocks.rows, blocks.outputs), out_at),
            scratch_shapes=[pltpu.VMEM((blocks.rows, blocks.outputs), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (tokens, outputs), out_dtype, manual_axis_type=mesh_axes(x, weights, group_sizes)
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul",
    )(*tiles, x, weights)


def _kernel(
    group: Any, start: Any, first: Any, end: Any, counts: Any, x: Any, weight: Any, out: Any, total: Any, *,
    blocks: Blocks, inputs: int, dtype: DTypeLike,
) -> None:  # fmt: skip
    """One block of inputs of one item."""
    item, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(item < counts[0])
    def _() -> None:
        left, right = x[...].astype(dtype), weight[0].astype(dtype)
        if inputs % blocks.inputs:  # beyond the edge there may be anything, NaN too
            rest = inputs - step * blocks.inputs
            left = jnp.where(lax.broadcasted_iota(jnp.int32, left.shape, 1) < rest, left, 0)
            right = jnp.where(lax.broadcasted_iota(jnp.int32, right.shape, 0) < rest, right, 0)
        total[...] += jnp.dot(
            left,
            right,
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        row = start[item] + lax.broadcasted_iota(jnp.int32, total.shape, 0)
        mine = (row >= first[item]) & (row < end[item])
        out[...] = jnp.where(mine, total[...], out[...].astype(jnp.float32)).astype(out.dtype)


def _block(size: int, largest: int) -> int:
    """The whole axis if it is short, else the largest divisor of whole lanes, or half the largest block."""
    if size <= largest:
        return size
    divisors = [block for block in range(largest, 2 * LANES - 1, -LANES) if size % block == 0]
    return divisors[0] if divisors else largest // 2


def _require(problem: Problem) -> None:
    for name, dtype in (("x", problem.dtype), ("weights", problem.weight_dtype), ("out", problem.out_dtype)):
        if dtype not in DTYPES:
            raise NotImplementedError(f"{name} of {dtype}; the TPU kernel serves float32 and bfloat16")


def _interpreted(x: Array, weights: Array, group_sizes: Array, /, *, out_dtype: DTypeLike) -> Array:
    return raise_on_races(
        grouped_matmul_tpu(x, weights, group_sizes, out_dtype=out_dtype, interpret=tpu_interpreter())
    )


BACKEND = Backend(
    "tpu",
    grouped_matmul_tpu,
    _require,
    _interpreted,
    Tunable(
        {PHASE: TUNABLE},
        lambda problem: problem.tuning_key,
        lambda phase, blocks: partial(grouped_matmul_tpu, blocks=blocks),
        lambda problem, phase, blocks: blocks["rows"] <= max(16, 4 * problem.tuning_key["rows"]),
    ),
)
