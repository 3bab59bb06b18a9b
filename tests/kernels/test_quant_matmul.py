"""The product with quantized weights: every backend on the same cases, against float64."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.quant_matmul import (
    QuantizedWeight,
    as_backend,
    check,
    list_backends,
    pack,
    quant_matmul,
    quantize,
    register_backend,
    unpack,
)
from pallas_kernels.quant_matmul.cases import CORNERS, build
from pallas_kernels.quant_matmul.check import check_case
from pallas_kernels.quant_matmul.reference import quant_matmul_reference

QUICK = ("int8", "int8, sizes of no tile", "fp8, blocks", "int4, groups of 32, zeros, bfloat16",
         "int4, groups of 128, zeros", "int8 by int8, bfloat16", "fp8 by fp8, blocks")  # fmt: skip
ON_TPU = [name if name in QUICK else pytest.param(name, marks=pytest.mark.interpret) for name in CORNERS]


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_corner(backend: str, name: str) -> None:
    check_case(CORNERS[name], as_backend(backend).multiply)


@pytest.mark.parametrize("name", ON_TPU)
def test_corner_on_tpu(name: str) -> None:
    kernel = as_backend("tpu").interpreted
    assert kernel is not None
    check_case(CORNERS[name], kernel)


def test_packing() -> None:
    values = jnp.asarray(np.random.default_rng(0).integers(-8, 8, size=(6, 5)), jnp.int8)
    np.testing.assert_array_equal(unpack(pack(values)), values)
    row = pack(jnp.asarray([[3], [-2]], jnp.int8))
    assert row.astype(jnp.uint8).tolist() == [[0xE3]]


@pytest.mark.parametrize("block", [None, (64, 1), (64, 64), (128, 96)])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantize_rounds_to_nearest(kind: Any, block: tuple[int, int] | None) -> None:
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(128, 96)), jnp.float32)
    weight = quantize(matrix, kind, block)
    assert weight.shape == matrix.shape
    rows, columns = weight.block
    scale = np.repeat(np.repeat(weight.scale, rows, axis=0), columns, axis=1)[:128, :96]
    off = np.abs(weight.dequantize() - matrix)
    step = np.maximum(np.abs(matrix) / 16, scale / 512) if kind == "fp8" else scale / 2  # 3 bits of mantissa
    assert (off <= step * (1 + 1e-4)).all()


def test_quantize_zeros() -> None:
    weight = quantize(jnp.zeros((4, 3)), "int8")
    np.testing.assert_array_equal(weight.dequantize(), np.zeros((4, 3)))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("kind", "block"), [("int8", None), ("int4", (32, 1)), ("fp8", (64, 64))])
def test_cut_over_devices(kind: Any, block: tuple[int, int] | None, axis: int) -> None:
    """A part of a weight is a weight: four devices hold a quarter of its inputs or outputs each."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 256)), jnp.float32)
    weight = quantize(jnp.asarray(rng.normal(size=(256, 256)), jnp.float32), kind, block)
    name = "model"
    mesh = jax.make_mesh((4,), (name,), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    cut = P(name) if axis == 0 else P(None, name)
    per_block = P() if weight.scale.shape[axis] == 1 else cut
    specs = replace(weight, values=cut, scale=per_block)

    def multiply(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
        out = quant_matmul(x, weight)
        return jax.lax.psum(out, name) if axis == 0 else out

    out_specs = P() if axis == 0 else P(None, name)
    x_specs = P(None, name) if axis == 0 else P()
    parts = jax.shard_map(multiply, mesh=mesh, in_specs=(x_specs, specs), out_specs=out_specs)
    whole = quant_matmul(x, weight, backend="reference")
    np.testing.assert_allclose(jax.jit(parts)(x, weight), whole, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_cpu_converts_a_few_columns_at_a_time(kind: Any) -> None:
    weight = jax.eval_shape(
        partial(quantize, kind=kind, block=(128, 1)), jax.ShapeDtypeStruct((1024, 4096), jnp.float32)
    )
    x = jax.ShapeDtypeStruct((8, 1024), jnp.bfloat16)
    memory: Any = jax.jit(partial(quant_matmul, backend="xla")).lower(x, weight).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 9e6  # in float32 the weight is 16.8 MB


def test_check_reports_what_is_wrong() -> None:
    def without_zeros(x: Any, weight: QuantizedWeight, /, **options: Any) -> jax.Array:
        return quant_matmul_reference(x, replace(weight, zero=None), **options)

    names = ("int4, groups of 64", "int4, groups of 64, zeros")
    report = check(without_zeros, cases={name: CORNERS[name] for name in names})
    assert [outcome.status for outcome in report.outcomes] == ["passed", "failed"]
    case = replace(CORNERS["int8"], inputs=4736 + 16)
    assert [outcome.status for outcome in check("tpu", cases={"odd": case}).outcomes] == ["refused"]
    with pytest.raises(ValueError, match="no interpreted form"):
        check("xla", interpret=True)


def test_own_backend() -> None:
    def doubled(x: Any, weight: QuantizedWeight, /, **options: Any) -> jax.Array:
        return 2 * quant_matmul_reference(x, weight, **options)

    register_backend("doubled", doubled)
    assert "doubled" in list_backends()
    arrays = build(CORNERS["int8"])
    for backend in ("doubled", doubled):
        out = quant_matmul(jnp.asarray(arrays.x), arrays.weight, backend=backend)
        np.testing.assert_allclose(out, 2 * arrays.out, atol=1e-3)


def test_bad_arguments() -> None:
    weight = quantize(jnp.ones((4, 3)), "int8")
    with pytest.raises(ValueError, match=r"x\[2, 3\]: the weight has 4 inputs"):
        quant_matmul(jnp.ones((2, 3)), weight)
    with pytest.raises(ValueError, match="activation='fp8'"):
        quant_matmul(jnp.ones((2, 4)), weight, activation="fp8")
    with pytest.raises(ValueError, match="no zero points"):
        quant_matmul(jnp.ones((2, 4)), replace(weight, zero=jnp.zeros((1, 3), jnp.int8)))
    with pytest.raises(ValueError, match="there are auto"):
        quant_matmul(jnp.ones((2, 4)), weight, backend="cuda")
    with pytest.raises(NotImplementedError, match="x of float16"):
        quant_matmul(jnp.ones((2, 4), jnp.float16), weight, backend="tpu")
    with pytest.raises(ValueError, match="there are int8, int4, fp8"):
        quantize(jnp.ones((4, 3)), "int3")
    with pytest.raises(ValueError, match="even numbers"):
        quantize(jnp.ones((5, 3)), "int4")
