"""The product with a packed weight: every backend on the same cases, against float64."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels.native import Library
from pallas_kernels.packed_matmul import (
    Norm,
    Problem,
    as_backend,
    check,
    choose_backend,
    cpu,
    pack,
    pack_gated,
    packed_matmul,
    packed_shape,
    take_outputs,
    unpack,
)
from pallas_kernels.packed_matmul.cases import CORNERS, Case, cases
from pallas_kernels.packed_matmul.check import check_case
from pallas_kernels.packed_matmul.reference import packed_matmul_reference


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_corner(backend: str, name: str) -> None:
    check_case(CORNERS[name], as_backend(backend).multiply)


@settings(max_examples=15)
@given(cases())
def test_any_case(case: Case) -> None:
    check_case(case, cpu.packed_matmul_cpu)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_the_same_in_any_company(dtype: str) -> None:
    """To the last bit, whatever the number of rows, and wherever the row stands among them."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(75, 200)), dtype)
    weight = pack(jnp.asarray(rng.normal(size=(200, 96)), dtype))
    multiply = jax.jit(partial(packed_matmul, outputs=96, out_dtype=jnp.float32))
    whole = np.asarray(multiply(x, weight))
    for first, rows in ((0, 1), (5, 1), (70, 2), (3, 12), (3, 13), (9, 32), (1, 40)):
        part = np.asarray(multiply(x[first : first + rows], weight))
        np.testing.assert_array_equal(part, whole[first : first + rows])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 64), (37, 75), (1, 1)])
def test_packing_loses_nothing(shape: tuple[int, int], dtype: str) -> None:
    weight = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    panels = pack(weight)
    wanted = packed_shape(*shape, weight.dtype)
    assert (panels.shape, panels.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(unpack(panels, *shape), weight)
    ids = jnp.asarray([0, shape[1] - 1, shape[1] // 2])
    np.testing.assert_array_equal(take_outputs(panels, ids, shape[0]), weight[:, ids].T)


def test_nan_stays_in_its_row() -> None:
    x = jnp.ones((40, 64)).at[20, 3].set(jnp.nan)
    for panels, gate in ((pack(jnp.ones((64, 32))), None), (pack_gated(jnp.ones((64, 2, 32))), "silu")):
        out = np.asarray(packed_matmul(x, panels, outputs=32, gate=gate))
        assert np.isnan(out[20]).all()
        assert not np.isnan(np.delete(out, 20, axis=0)).any()


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_gates_of_any_size(gate: Any) -> None:
    """From gates that let nothing through to those that let all: nothing overflows on the way."""
    x = jnp.asarray([[-1e30], [-300.0], [-88.0], [-1.0], [0.0], [1.0], [88.0], [300.0], [1e30]])
    panels = pack_gated(jnp.stack([jnp.ones((1, 1)), jnp.zeros((1, 1))], axis=1) + 0.0)
    ones = pack_gated(jnp.ones((1, 2, 1)))
    assert not np.asarray(packed_matmul(x, panels, outputs=1, gate=gate)).any()
    out = np.asarray(packed_matmul(x, ones, outputs=1, gate=gate))
    wanted = np.asarray((jax.nn.silu if gate == "silu" else jax.nn.gelu)(x) * x)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-30)


def test_sums_in_float32() -> None:
    """A sum that bfloat16 would not hold: 256 and then ones."""
    x = jnp.ones((1, 513), jnp.bfloat16).at[0, 0].set(256)
    out = packed_matmul(x, pack(jnp.ones((513, 1), jnp.bfloat16)), outputs=1)
    np.testing.assert_array_equal(out, [[768.0]])


def problem(**changes: Any) -> Problem:
    base = Problem("cpu", "cpu", 2, 64, 64, jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))
    return dataclasses.replace(base, **changes)


def test_chosen_first_on_cpu() -> None:
    assert choose_backend("auto", problem()).backend is cpu.BACKEND


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, message in (
        ({"platform": "gpu"}, "platform gpu"),
        ({"dtype": jnp.dtype("float16")}, "float16 to bfloat16: serves float32 to float32"),
        ({"dtype": jnp.dtype("float32")}, "float32 to bfloat16: serves"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            cpu.require(problem(**changes))
    with pytest.raises(NotImplementedError, match="weights of float16"):
        pack(jnp.ones((4, 4), jnp.float16))
    source = dataclasses.replace(cpu.LIBRARY.source, compiler="no-such-compiler")
    monkeypatch.setattr(cpu, "LIBRARY", Library(source, cpu.LIBRARY.handlers))
    choice = choose_backend("auto", problem())
    assert choice.backend.name == "reference"
    assert "no C++ compiler: no-such-compiler not found" in str(choice)


def test_shapes_that_do_not_go_together() -> None:
    x, weight = jnp.ones((2, 64)), pack(jnp.ones((64, 64)))
    with pytest.raises(ValueError, match=r"for 64 inputs of float32 and 65 outputs it is to be float32\[3, "):
        packed_matmul(x, weight, outputs=65)
    with pytest.raises(ValueError, match=r"for 64 inputs of bfloat16 .* it is to be uint32\[2, 32, 32\]"):
        packed_matmul(x.astype(jnp.bfloat16), weight, outputs=64)
    plain: dict[str, Any] = {"gate": None, "norm": None, "residual": None}
    for call in ((x[:, :40], weight, 64), (x, weight, 200), (x, weight.view(jnp.uint32), 64)):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*packed_matmul"):
            cpu.packed_matmul_cpu(*call[:2], outputs=call[2], out_dtype=jnp.float32, **plain)
    for fused, message in (
        ({"norm": Norm(jnp.ones(63), 1e-6)}, r"norm.weight float32\[63\]: it is to be float32\[64\]"),
        ({"residual": jnp.ones((2, 63))}, r"residual float32\[2, 63\]: it is to be float32\[2, 64\]"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_matmul(x, weight, outputs=64, **fused)
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*packed_matmul"):
            cpu.packed_matmul_cpu(x, weight, outputs=64, out_dtype=jnp.float32, **plain | fused)


def test_check_reports_what_is_wrong() -> None:
    def transposed(x: Any, weight: Any, /, **options: Any) -> jax.Array:
        return packed_matmul_reference(x[::-1], weight, **options)

    report = check(transposed, cases={name: CORNERS[name] for name in ("one row", "two rows")})
    assert [outcome.status for outcome in report.outcomes] == ["passed", "failed"]
    assert "off by" in report.outcomes[1].detail
    report = check("cpu", cases={"float16": Case(3, dtype="float16")})
    assert [outcome.status for outcome in report.outcomes] == ["refused"]
