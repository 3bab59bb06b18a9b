"""The product with quantized weights on Hopper GPUs: the tokens' part of it, around the Mosaic GPU kernel."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.devices import current_device
from pallas_kernels.hopper import ROWS, require_hopper
from pallas_kernels.quant_matmul.activations import Activation, quantize_rows
from pallas_kernels.quant_matmul.backend import Backend
from pallas_kernels.quant_matmul.gpu_plan import STEP, TUNABLE, Plan, fit, make_plan, weights_of
from pallas_kernels.quant_matmul.problem import Problem
from pallas_kernels.quant_matmul.weight import QuantizedWeight
from pallas_kernels.tuning import Blocks, Tunable

OUTPUTS = 2 * ROWS
"""Of the smallest tile."""


def quant_matmul_gpu(
    x: Float[Array, "tokens in"],
    weight: QuantizedWeight,
    /,
    *,
    activation: Activation,
    out_dtype: DTypeLike,
    plan: Plan | None = None,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> Float[Array, "tokens out"]:
    """See `quant_matmul`.

    Args:
        plan: how the work is cut; None: by its blocks.
        blocks: of the plan; None: tuned for this card, or computed.
        interpret: parameters of Mosaic GPU's interpreter, to run on the CPU.
    """
    from pallas_kernels.quant_matmul import gpu_kernel

    tokens, inputs = x.shape
    kind = "" if interpret else current_device()[1]
    problem = Problem(
        "gpu", kind, tokens, *weight.shape, jnp.dtype(x.dtype), weight.kind, weight.block[0],
        weight.zero is not None, activation,
    )  # fmt: skip
    weights = weights_of(problem)
    itemsize = jnp.dtype(out_dtype).itemsize
    if plan is None:
        cut = partial(fit, blocks=blocks) if blocks else make_plan
        plan = cut(problem, weights, itemsize)
    per_token = None
    if activation != "none":
        x, scale = quantize_rows(x, activation, weight.block[0])
        per_token = scale.T
        if weights.grouped:
            per_token = jnp.repeat(per_token, max(1, weights.scale_rows // STEP), axis=0)
    elif weights.zero:
        per_token = x.astype(jnp.float32).reshape(tokens, -1, weights.chunk).sum(axis=2).T
    more = -tokens % plan.tokens
    x = jnp.pad(x.astype(jnp.bfloat16), ((0, more), (0, 0)))
    if weights.packed:
        halves = x.reshape(-1, inputs // STEP, STEP // 2, 2).swapaxes(2, 3)
        x = (halves * jnp.array([[1], [1 / 16]], jnp.bfloat16)).reshape(x.shape)
    out = gpu_kernel.multiply_tiles(
        x,
        weight.values,
        weight.scale_per_column(),
        weight.zero_per_column(),
        None if per_token is None else jnp.pad(per_token, ((0, 0), (0, more))),
        plan=plan,
        weights=weights,
        out_dtype=jnp.float32 if plan.splits > 1 else out_dtype,
        interpret=interpret,
    )
    return out[:, :tokens].sum(axis=0, dtype=out.dtype).astype(out_dtype)


def require(problem: Problem) -> None:
    """Raises NotImplementedError, with the reason, for what the kernel does not serve."""
    require_hopper(problem.platform, problem.device_kind)
    if problem.dtype != jnp.bfloat16:
        raise NotImplementedError(f"x of {problem.dtype}: the GPU kernel serves bfloat16")
    if problem.inputs % STEP or problem.outputs % OUTPUTS:
        raise NotImplementedError(
            f"a weight of [{problem.inputs}, {problem.outputs}]: the GPU kernel serves multiples of {STEP}"
        )
    rows = problem.scale_rows
    if rows < problem.inputs and (problem.inputs % rows or (rows not in (32, 64) and rows % STEP)):
        raise NotImplementedError(
            f"a scale for each {rows} of {problem.inputs} inputs: the GPU kernel serves 32, 64 and multiples "
            f"of {STEP} that divide them"
        )


BACKEND = Backend(
    "gpu",
    quant_matmul_gpu,
    require,
    tunable=Tunable(
        {"few": TUNABLE, "many": TUNABLE},
        lambda problem: problem.tuning_key,
        lambda phase, blocks: partial(quant_matmul_gpu, blocks=blocks),
        lambda problem, phase, blocks: phase == "few" or blocks["warpgroups"] == 2,
    ),
)
