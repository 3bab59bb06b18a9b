"""The product with quantized weights on TPU: a Pallas kernel that converts them block by block in VMEM.

Grid: tiles of `out`, tiles of tokens, tiles of `in`. Where a tile has one scale for all its rows it is
applied to the product, so that the values, exact in bfloat16, are multiplied as they are.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels._compat import raise_on_races, tpu_interpreter
from pallas_kernels.devices import current_device
from pallas_kernels.quant_matmul.activations import Activation, quantize_rows
from pallas_kernels.quant_matmul.backend import Backend
from pallas_kernels.quant_matmul.problem import Problem
from pallas_kernels.quant_matmul.weight import QuantizedWeight
from pallas_kernels.tuning import Blocks, Tunable, lookup

LANES = 128
WHOLE_INPUTS = 4096
"""An axis of no usable divisor is one block up to this length: 6 MiB of values and of their conversion."""
MOST = {"tokens": 256, "inputs": 1024, "outputs": 512}
"""Of a tile, where nothing was measured."""
TUNABLE = {"tokens": (128, 256, 512), "inputs": (512, 1024, 2048), "outputs": (256, 512, 1024)}
"""What `tuning.json` may choose in place of those."""
DTYPES = (jnp.float32, jnp.bfloat16)


def quant_matmul_tpu(
    x: Float[Array, "tokens in"],
    weight: QuantizedWeight,
    /,
    *,
    activation: Activation,
    out_dtype: DTypeLike,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "tokens out"]:
    """See `quant_matmul`.

    Args:
        blocks: the most of a tile; None: tuned for this chip, or the default.
        interpret: parameters of the TPU interpreter.
    """
    tokens, inputs = x.shape
    outputs = weight.shape[1]
    axes = ManualAxisType(
        varying=frozenset().union(
            *(jax.typeof(array).manual_axis_type.varying for array in jax.tree.leaves((x, weight)))
        )
    )
    problem = Problem(
        "tpu", "" if interpret else current_device()[1], tokens, inputs, outputs, jnp.dtype(x.dtype),
        weight.kind, weight.block[0], weight.zero is not None, activation,
    )  # fmt: skip
    most = blocks or most_of_tile(problem)
    step = block_of_inputs(problem, most["inputs"])
    steps = inputs // step
    rows = min(most["tokens"], -(-tokens // 32) * 32)
    columns = min(outputs, most["outputs"])
    groups = max(1, step // weight.block[0])  # of scales in a block
    factor = 2 if weight.kind == "int4" else 1

    def per_step(scale: Array) -> Array:
        """`[steps, groups, outputs]`: a scale for many blocks is repeated for each."""
        if scale.shape[0] == 1:
            return jnp.broadcast_to(scale, (steps, 1, outputs))
        return scale.reshape(steps, groups, outputs)

    def of_groups(column: Any, row: Any, step: Any) -> Any:
        return step, 0, column

    spec_of_groups = pl.BlockSpec((1, groups, columns), of_groups)
    operands = [weight.values, per_step(weight.scale_per_column())]
    specs = [pl.BlockSpec((step // factor, columns), lambda n, m, k: (k, n)), spec_of_groups]
    zero = weight.zero_per_column()
    if zero is not None:
        operands.append(per_step(zero))
        specs.append(spec_of_groups)
    if activation != "none":
        x, scale = quantize_rows(x, activation, weight.block[0])
        scale = jnp.broadcast_to(scale.T[:, :, None], (scale.shape[1], tokens, 1))
        per_row = scale.shape[0] > 1
        operands.append(scale)
        specs.append(pl.BlockSpec((1, rows, 1), lambda n, m, k: (k if per_row else 0, m, 0)))
    return pl.pallas_call(
        partial(_kernel, kind=weight.kind, zero=zero is not None, activation=activation),
        grid=(pl.cdiv(outputs, columns), pl.cdiv(tokens, rows), steps),
        in_specs=[pl.BlockSpec((rows, step), lambda n, m, k: (m, k)), *specs],
        out_specs=pl.BlockSpec((rows, columns), lambda n, m, k: (m, n)),
        out_shape=jax.ShapeDtypeStruct((tokens, outputs), out_dtype, manual_axis_type=axes),
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=32 * 2**20
        ),
        interpret=interpret,
        name="quant_matmul",
    )(x, *operands)


def _kernel(x: Any, values: Any, scale: Any, *rest: Any, kind: str, zero: bool, activation: str) -> None:
    """One block of inputs."""
    *extra, out, total = rest

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    left, right = x[...], values[...]
    if activation == "int8":
        product = jnp.dot(left, right, preferred_element_type=jnp.int32).astype(jnp.float32)
    else:
        dtype = jnp.bfloat16 if activation == "fp8" else left.dtype
        right = _as_floats(right, kind)
        if zero:
            right = _by_groups(right, extra[0][0], jnp.subtract)
        if scale.shape[1] > 1:
            right = _by_groups(right, scale[0], jnp.multiply)
        product = jnp.dot(
            left.astype(dtype),
            right.astype(dtype),
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
    if scale.shape[1] == 1:
        product *= scale[0]
    total[...] += product if activation == "none" else product * extra[-1][0]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _as_floats(values: Array, kind: str) -> Array:
    """A block in float32."""
    if kind == "int4":  # bytes are pairs of rows: so a TPU packs four bits in its registers
        values = pltpu.bitcast(values, jnp.int4)
    return values.astype(jnp.float32)


def _by_groups(values: Array, per_group: Array, operation: Any) -> Array:
    """Applies each group's number to the rows of the group."""
    groups, columns = per_group.shape
    split = values.reshape(groups, -1, columns)
    return operation(split, per_group[:, None, :]).reshape(values.shape)


def most_of_tile(problem: Problem) -> Blocks:
    """What was measured on the problem's chip, or the default.

    Raises:
        ValueError: see `lookup`.
    """
    key = {"phase": problem.phase, **problem.tuning_key}
    return lookup("quant_matmul", "tpu", problem.device_kind, key, TUNABLE) or MOST


def block_of_inputs(problem: Problem, most: int) -> int:
    """Inputs in a block: whole groups of scales or a part of one; one group if the tokens have scales too.

    Raises:
        NotImplementedError: there is no such block of a length that fits.
    """
    inputs, scale_rows, activation = problem.inputs, problem.scale_rows, problem.activation
    if scale_rows >= inputs:
        fitting = [n for n in range(most, LANES - 1, -LANES) if inputs % n == 0]
    elif activation != "none":
        fitting = [scale_rows] if scale_rows % LANES == 0 and inputs % scale_rows == 0 else []
    else:
        fitting = [n for n in range(most, LANES - 1, -LANES) if inputs % n == 0 and n % scale_rows == 0]
    if fitting:
        return fitting[0]
    if inputs <= WHOLE_INPUTS and (
        inputs <= scale_rows or (activation == "none" and inputs % scale_rows == 0)
    ):
        return inputs
    raise NotImplementedError(
        f"{inputs} inputs with a scale for each {scale_rows}: the TPU kernel serves multiples of {LANES} "
        f"with groups that divide a block of {most}"
    )


def _require(problem: Problem) -> None:
    if problem.dtype not in DTYPES:
        raise NotImplementedError(f"x of {problem.dtype}; the TPU kernel serves float32 and bfloat16")
    block_of_inputs(problem, most_of_tile(problem)["inputs"])


def _interpreted(x: Array, weight: QuantizedWeight, /, **options: Any) -> Array:
    return raise_on_races(quant_matmul_tpu(x, weight, **options, interpret=tpu_interpreter()))


BACKEND = Backend(
    "tpu",
    quant_matmul_tpu,
    _require,
    _interpreted,
    Tunable(
        {"few": TUNABLE, "many": TUNABLE},
        lambda problem: problem.tuning_key,
        lambda phase, blocks: partial(quant_matmul_tpu, blocks=blocks),
        lambda problem, phase, blocks: phase == "many" or blocks["tokens"] == min(TUNABLE["tokens"]),
    ),
)
