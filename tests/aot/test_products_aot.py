"""Products with quantized and with experts' weights compiled for chips that are not there.

The weight is read as it is stored: no copy of it, in its own or another type, is in the compiled program.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from aot_cases import Product, product_cases
from aot_records import check_kernel, compile_lowered
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quant_matmul import QuantizedWeight, quant_matmul, quantize
from pallas_kernels.targets import Target

pytestmark = pytest.mark.aot


def quantized(case: Product) -> QuantizedWeight:
    """Shapes of a weight, all devices together."""
    rows = case.scale_rows or case.inputs
    block = (rows, rows if case.kind == "fp8" else 1)
    matrix = jax.ShapeDtypeStruct((case.inputs, case.outputs), jnp.float32)
    weight = jax.eval_shape(partial(quantize, kind=case.kind, block=block), matrix)
    zero = jax.ShapeDtypeStruct(weight.scale.shape, jnp.int8) if case.zero else None
    return replace(weight, zero=zero)


def lower(case: Product) -> tuple[jax.stages.Lowered, int]:
    """The program, and the bytes of its weight on each device."""
    mesh = Target.parse(case.target).mesh((case.devices,), ("tensor",))
    x: Any = jax.ShapeDtypeStruct((case.tokens, case.inputs), jnp.bfloat16)
    if case.experts:
        weight: Any = jax.ShapeDtypeStruct((case.experts, case.inputs, case.outputs), jnp.bfloat16)
        operands = (x, weight, jax.ShapeDtypeStruct((case.experts,), jnp.int32))
        multiply: Any = partial(grouped_matmul, out_dtype=jnp.bfloat16, backend=case.backend)
    else:
        operands = (x, quantized(case))
        multiply = partial(
            quant_matmul, activation=case.activation, out_dtype=jnp.bfloat16, backend=case.backend
        )
    nbytes = max(one.size * one.dtype.itemsize for one in jax.tree.leaves(operands[1])) // case.devices
    cut, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    specs = (
        whole,
        *(jax.tree.map(lambda _: cut if case.devices > 1 else whole, one) for one in operands[1:]),
    )
    if case.devices > 1:
        multiply = jax.shard_map(multiply, mesh=mesh, in_specs=specs, out_specs=cut)
    arrays = jax.tree.map(
        lambda one, spec: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=NamedSharding(mesh, spec)),
        operands,
        specs,
    )
    with jax.set_mesh(mesh):
        return jax.jit(multiply).lower(*arrays), nbytes


@pytest.mark.parametrize("case", product_cases(), ids=str)
def test_product(case: Product) -> None:
    lowered, weight = lower(case)
    result = compile_lowered(Target.parse(case.target), lowered)
    checked = check_kernel(result)
    assert not result.text.copies(weight), "the weight is copied"
    assert not result.text.collectives()
    result.record(case.op, case.backend, case.devices, case.shape, "", "no copy of the weight", *checked)
