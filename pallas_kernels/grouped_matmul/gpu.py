"""The grouped product on Hopper GPUs: what is done with rows around the Mosaic GPU kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, Shaped

from pallas_kernels.devices import current_device
from pallas_kernels.grouped_matmul.backend import Backend
from pallas_kernels.grouped_matmul.gpu_plan import PHASE, STEP, TUNABLE, Plan, fit, make_plan
from pallas_kernels.grouped_matmul.problem import Problem
from pallas_kernels.grouped_matmul.tiles import cut_tiles, from_bits, mesh_axes
from pallas_kernels.hopper import require_hopper
from pallas_kernels.tuning import Blocks, Tunable

INPUTS, OUTPUTS = 8, 16
"""Those of the weights are multiples of these, of which the copy engine's boxes are made."""
OUT_DTYPES = (jnp.float32, jnp.bfloat16)


def grouped_matmul_gpu(
    x: Float[Array, "tokens in"],
    weights: Shaped[Array, "groups in out"],
    group_sizes: Int[Array, " groups"],
    /,
    *,
    out_dtype: DTypeLike,
    plan: Plan | None = None,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> Float[Array, "tokens out"]:
    """See `grouped_matmul`.

    The kernel reads and writes whole tiles of rows, all of one group. XLA gathers rows into these, and takes
    them out again, along with what is done to rows before and after.

    Args:
        plan: how the work is cut; None: by its blocks.
        blocks: of the plan; None: tuned for this card, or computed.
        interpret: parameters of Mosaic GPU's interpreter, to run on the CPU.
    """
    from pallas_kernels.grouped_matmul import gpu_kernel

    weights, tokens = from_bits(weights), x.shape[0]
    groups, inputs, outputs = weights.shape
    problem = Problem(
        "gpu", "" if interpret else current_device()[1], tokens, groups, inputs, outputs, jnp.dtype(x.dtype),
        jnp.dtype(weights.dtype), jnp.dtype(out_dtype),
    )  # fmt: skip
    if plan is None:
        plan = fit(problem, blocks) if blocks else make_plan(problem)
    tiles = cut_tiles(group_sizes, tokens, plan.rows, aligned=False)
    taken = (tiles.start[:, None] + jnp.arange(plan.rows)).reshape(-1)
    out = gpu_kernel.multiply_tiles(
        jnp.pad(x.at[taken].get(mode="clip"), ((0, 0), (0, -inputs % STEP))),
        weights,
        tiles.group,
        tiles.counts[:1],
        plan=plan,
        out_dtype=out_dtype,
        interpret=interpret,
    )
    # the kernel's type does not say over which axes of the mesh its result differs
    axes = mesh_axes(x, weights, group_sizes).varying - jax.typeof(out).manual_axis_type.varying
    out = lax.pcast(out, tuple(axes), to="varying") if axes else out
    places = tile_places(group_sizes, tokens, plan.rows)
    rows = out.at[places, :outputs].get(mode="clip")
    return jnp.where((jnp.arange(tokens) < group_sizes.sum())[:, None], rows, jnp.zeros((), out.dtype))


def tile_places(group_sizes: Int[Array, " groups"], tokens: int, rows: int) -> Int32[Array, " tokens"]:
    """Where each row is among those of all tiles of `cut_tiles`; of rows without a group anything."""
    sizes = group_sizes.astype(jnp.int32)
    end, tiles = jnp.cumsum(sizes), -(-sizes // rows)
    moved = (jnp.cumsum(tiles) - tiles) * rows - (end - sizes)
    row = jnp.arange(tokens, dtype=jnp.int32)
    return row + moved.at[jnp.searchsorted(end, row, side="right")].get(mode="clip")


def require(problem: Problem) -> None:
    """Raises NotImplementedError, with the reason, for what the kernel does not serve."""
    require_hopper(problem.platform, problem.device_kind)
    for name, dtype in (("x", problem.dtype), ("weights", problem.weight_dtype)):
        if dtype != jnp.bfloat16:
            raise NotImplementedError(f"{name} of {dtype}: the GPU kernel serves bfloat16")
    if problem.out_dtype not in OUT_DTYPES:
        raise NotImplementedError(f"out of {problem.out_dtype}: the GPU kernel serves float32 and bfloat16")
    if problem.inputs % INPUTS or problem.outputs % OUTPUTS:
        raise NotImplementedError(
            f"weights of [{problem.inputs}, {problem.outputs}]: the GPU kernel serves multiples of "
            f"[{INPUTS}, {OUTPUTS}]"
        )


def _worth_trying(problem: Problem, phase: str, blocks: Blocks) -> bool:
    """Whether tiles are about as tall as groups, and the blocks can be had."""
    average = int(problem.tuning_key["rows"])
    plan = fit(problem, blocks)
    return blocks["rows"] <= max(16, 4 * average) and (plan.warpgroups, plan.stages) == (
        blocks["warpgroups"],
        blocks["stages"],
    )


BACKEND = Backend(
    "gpu",
    grouped_matmul_gpu,
    require,
    tunable=Tunable(
        {PHASE: TUNABLE},
        lambda problem: problem.tuning_key,
        lambda phase, blocks: partial(grouped_matmul_gpu, blocks=blocks),
        _worth_trying,
    ),
)
