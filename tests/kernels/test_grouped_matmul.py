"""The grouped product: every backend on the same cases, against float64."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from pallas_kernels.grouped_matmul import (
    Backend,
    as_backend,
    check,
    grouped_matmul,
    list_backends,
    register_backend,
)
from pallas_kernels.grouped_matmul.cases import CORNERS, Case, build, cases
from pallas_kernels.grouped_matmul.check import check_case
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul.tiles import cut_tiles, most_items
from pallas_kernels.grouped_matmul.tpu import Blocks, grouped_matmul_tpu


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_corner(backend: str, name: str) -> None:
    check_case(CORNERS[name], as_backend(backend).multiply)


@pytest.mark.parametrize("name", [name for name in CORNERS if ", bfloat16" not in name])
def test_corner_on_tpu(name: str) -> None:
    kernel = as_backend("tpu").interpreted
    assert kernel is not None
    check_case(CORNERS[name], kernel)


@settings(max_examples=8)
@given(cases())
def test_any_case(case: Case) -> None:
    check_case(case, as_backend("xla").multiply)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("name", [name for name in CORNERS if "float" not in name])
def test_items_hold_every_row_once(name: str, aligned: bool) -> None:
    """Each row with its group, those without one in the items after `counts[0]`, in tiles in order."""
    sizes, tokens = CORNERS[name].sizes, CORNERS[name].tokens
    tiles = cut_tiles(jnp.asarray(sizes), tokens, 16, aligned=aligned)
    of_rows, seen = np.repeat(np.arange(len(sizes)), sizes), []
    with_group, total = (int(n) for n in tiles.counts)
    assert total <= most_items(tokens, len(sizes), 16) == len(tiles.group)
    for item in range(total):
        start, first, end = (int(x[item]) for x in (tiles.start, tiles.first, tiles.end))
        assert start <= first < end <= start + 16
        assert not aligned or start % 16 == 0
        seen += range(first, end)
        groups = set(of_rows[first:end].tolist())
        assert groups == ({int(tiles.group[item])} if item < with_group else set())
    assert seen == list(range(tokens))


def test_tpu_blocks_of_any_size() -> None:
    """Several blocks along every axis, an edge in each."""
    case = Case((9, 0, 40, 3), padding=30, inputs=300, outputs=200)
    kernel = partial(interpreted_with, blocks=Blocks(16, 128, 128))
    check_case(case, kernel)


def interpreted_with(*args: Any, blocks: Blocks, **options: Any) -> jax.Array:
    params = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    return grouped_matmul_tpu(*args, **options, blocks=blocks, interpret=params)


def test_experts_over_devices() -> None:
    """Each device has two of eight groups and multiplies the rows of its own; the sum is the whole."""
    case = Case((5, 0, 9, 1, 7, 2, 0, 8), inputs=64, outputs=32)
    arrays = build(case)
    mesh = jax.make_mesh((4,), ("expert",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("expert"), P()), out_specs=P())
    def multiply(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
        first = jax.lax.axis_index("expert") * 2
        before = jnp.where(jnp.arange(8) < first, group_sizes, 0).sum()
        mine = jax.lax.dynamic_slice_in_dim(group_sizes, first, 2)
        out = grouped_matmul(jnp.roll(x, -before, axis=0), weights, mine)
        return jax.lax.psum(jnp.roll(out, before, axis=0), "expert")

    weights = np.nan_to_num(arrays.weights)
    out = jax.jit(multiply)(jnp.asarray(arrays.x), weights, jnp.asarray(arrays.group_sizes))
    np.testing.assert_allclose(out, arrays.out, atol=1e-4)


def test_cpu_reads_only_the_groups_in_use() -> None:
    """Weights given as bits are neither copied nor converted as a whole; the loop is over the items."""
    shapes = ((16, 256), jnp.bfloat16), ((64, 256, 512), jnp.uint16), ((64,), jnp.int32)
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    compiled = jax.jit(partial(grouped_matmul, backend="xla")).lower(*args).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2e6  # all weights are 17 MB
    made = re.findall(r"= \S*\[64,256,512\]\S* (\w[\w-]*)\(", compiled.as_text() or "")
    assert set(made) <= {"parameter", "get-tuple-element", "bitcast"}


def test_check_reports_what_is_wrong() -> None:
    def one_too_many(x: Any, weights: Any, sizes: Any, /, **options: Any) -> jax.Array:
        return grouped_matmul_reference(x, weights, sizes.at[-1].add(1), **options)

    report = check(one_too_many, cases={name: CORNERS[name] for name in ("one row", "empty groups between")})
    assert [outcome.status for outcome in report.outcomes] == ["passed", "failed"]
    assert "row 12" in report.outcomes[1].detail
    only_float32 = Backend("mine", grouped_matmul_reference, as_backend("tpu").require)
    report = check(only_float32, cases={"float16": Case((3,), dtype="float16")})
    assert [outcome.status for outcome in report.outcomes] == ["refused"]
    with pytest.raises(ValueError, match="no interpreted form"):
        check("xla", interpret=True)


def test_own_backend() -> None:
    def doubled(x: jax.Array, weights: jax.Array, group_sizes: jax.Array, /, **options: Any) -> jax.Array:
        return 2 * grouped_matmul_reference(x, weights, group_sizes, **options)

    register_backend("doubled", doubled)
    assert "doubled" in list_backends()
    x, weights, sizes = jnp.ones((3, 4)), jnp.ones((2, 4, 5)), jnp.array([1, 1])
    for backend in ("doubled", doubled):
        out = grouped_matmul(x, weights, sizes, backend=backend)
        np.testing.assert_array_equal(out, [[8] * 5, [8] * 5, [0] * 5])


def test_bad_arguments() -> None:
    x, weights, sizes = jnp.ones((3, 4)), jnp.ones((2, 4, 5)), jnp.array([1, 1])
    with pytest.raises(ValueError, match=r"x\[3, 3\], weights\[2, 4, 5\]"):
        grouped_matmul(x[:, :3], weights, sizes)
    with pytest.raises(ValueError, match="there are auto"):
        grouped_matmul(x, weights, sizes, backend="cuda")
    with pytest.raises(NotImplementedError, match="x of float16"):
        grouped_matmul(x.astype(jnp.float16), weights, sizes, backend="tpu")
