"""The TPU kernels in Pallas' interpreter: the op's cases, with its race detector on."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels._compat import raise_on_races, tpu_interpreter
from pallas_kernels.paged_attention import INTERLEAVED, PageGeometry, Problem
from pallas_kernels.paged_attention.cases import KEYS_AND_VALUES, MIXED, Case, strategy
from pallas_kernels.paged_attention.check import check_case
from pallas_kernels.paged_attention.tpu import BACKEND, attend
from pallas_kernels.paged_attention.tpu_blocks import budget_of, check_smem, make_plan, vmem_bytes
from pallas_kernels.paged_attention.tpu_layout import SIDE_BY_SIDE, Lanes
from pallas_kernels.paged_attention.tpu_plan import Blocks

REFUSED = {
    "page of one": "page_size=1",
    "int8, float32": "page_size=8 with pages of int8",
    "float8, float32": "page_size=8 with pages of float8_e4m3fn",
}
"""Corners that the kernels do not serve, and what they say."""
FAST = ("mixed", "int8", "bfloat16, all at once")
"""Corners of every run; the rest are marked, for each takes seconds to trace."""
CORNERS_SERVED = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.interpret)
    for name in KEYS_AND_VALUES
    if name not in REFUSED
]

SMALL = partial(
    attend,
    interpret=tpu_interpreter(),
    decode_blocks=Blocks(queries=1, pages=2, keys=8, slots=3),
    rest_blocks=Blocks(queries=8, pages=4, keys=16),
)
"""With blocks so small that a few keys take several, and several buffers are used again."""


def holds(case: Case, function: Any = BACKEND.interpreted) -> None:
    check_case(case, BACKEND, function)


@pytest.mark.parametrize("name", CORNERS_SERVED)
def test_corner(name: str) -> None:
    holds(KEYS_AND_VALUES[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_said(name: str) -> None:
    with pytest.raises(NotImplementedError, match=REFUSED[name]):
        holds(KEYS_AND_VALUES[name])


SMALL_BLOCKS = {
    "many blocks": Case(rows=((1, 100), (1, 3), (1, 33), (20, 90), (9, 9), (2, 70))),
    "window": Case(rows=((1, 100), (1, 3), (20, 90), (9, 9)), sliding_window=11),
    "bfloat16, sinks and soft cap": Case(
        rows=((1, 64), (1, 65), (16, 64), (3, 50)), page_size=16, sinks=True, soft_cap=3.0, dtype="bfloat16",
        heads=6, kv_heads=2, head_dim=96,
    ),
}  # fmt: skip
MORE = {"window", "bfloat16, sinks and soft cap"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.interpret) if n in MORE else n for n in SMALL_BLOCKS],
)
def test_small_blocks(name: str) -> None:
    holds(SMALL_BLOCKS[name], SMALL)


@pytest.mark.interpret
@settings(max_examples=12)
@given(strategy(dtypes=(("float32", None), ("bfloat16", None)), head_dims=(64, 128), page_sizes=(8, 16)))
def test_any_case(case: Case) -> None:
    holds(case, SMALL)


@pytest.mark.interpret
@settings(max_examples=12)
@given(
    strategy(
        dtypes=(("float32", None), ("bfloat16", "int8"), ("bfloat16", "float8_e4m3fn"), ("bfloat16", None)),
        head_dims=(64, 80, 128),
        page_sizes=(32, 64),
    )
)
def test_any_case_of_large_pages(case: Case) -> None:
    holds(case, SMALL)


def test_a_race_is_an_error() -> None:
    """A copy that nobody waits for before its target is read must not go unnoticed."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def body(x: Any, out: Any, scratch: Any, done: Any) -> None:
        copy = pltpu.make_async_copy(x, scratch, done)
        copy.start()
        out[...] = scratch[...]
        copy.wait()

    def double(x: jax.Array) -> jax.Array:
        copied = pl.pallas_call(
            body,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
            interpret=tpu_interpreter(),
        )(x)
        return raise_on_races(copied)

    with pytest.raises(Exception, match="race"):
        jax.jit(double)(jnp.zeros((8, 128))).block_until_ready()


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_pages_are_packed_and_unpacked(head_dim: int) -> None:
    geometry = PageGeometry(3, 8, 4, head_dim, jnp.dtype(jnp.bfloat16))
    logical = jnp.arange(np.prod(geometry.logical_shape)).reshape(geometry.logical_shape).astype(jnp.bfloat16)
    packed = SIDE_BY_SIDE.pack(logical)
    array = SIDE_BY_SIDE.array(geometry)
    assert (packed.shape, packed.dtype) == (array.shape, array.dtype)
    assert packed.shape[-1] % 128 == 0
    assert SIDE_BY_SIDE.read(packed, 4, head_dim) == geometry
    assert SIDE_BY_SIDE.read(INTERLEAVED.pack(logical), 4, head_dim) is None
    np.testing.assert_array_equal(SIDE_BY_SIDE.unpack(packed, 4, head_dim), logical)
    for part, heads in zip(
        np.split(packed, 2, axis=SIDE_BY_SIDE.heads_axis), (slice(4), slice(4, 8)), strict=True
    ):
        np.testing.assert_array_equal(part, SIDE_BY_SIDE.pack(logical[:, :, heads]))


def test_a_page_table_too_large_for_scalar_memory() -> None:
    check_smem(256, 512)
    with pytest.raises(ValueError, match="max_num_seqs or max_model_len, or raise page_size"):
        check_smem(256, 1024)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 16, 128), (128, 8, 128), (9, 3, 64), (4, 1, 256)]
)
@pytest.mark.parametrize("page_size", [8, 128])
def test_default_blocks_fit(kind: str, heads: int, kv_heads: int, head_dim: int, page_size: int) -> None:
    for dtype in (jnp.float32, jnp.int8):
        for decode, tokens, rows in ((True, 64, 64), (False, 8192, 256), (False, 64, 64)):
            plan = make_plan(
                decode=decode, heads=heads, kv_heads=kv_heads, lanes=Lanes(head_dim), page_size=page_size,
                columns=512, dtype=jnp.dtype(dtype), queries=jnp.dtype(jnp.bfloat16), sliding_window=None,
                soft_cap=None, tokens=tokens, rows=rows, device_kind=kind, blocks=None,
            )  # fmt: skip
            assert vmem_bytes(plan) <= budget_of(kind)
            assert plan.keys_in_block % plan.blocks.keys == 0
            assert plan.blocks.queries == 1 or not decode


def test_what_require_refuses() -> None:
    geometry = PageGeometry(1, 16, 2, 64, jnp.dtype(jnp.bfloat16))
    problem = Problem("tpu", "TPU v5 lite", 4, geometry, jnp.dtype(jnp.bfloat16))
    BACKEND.require(problem)
    for change, words in (
        ({"platform": "cpu"}, "platform cpu: serves tpu"),
        ({"geometry": dataclasses.replace(geometry, page_size=24)}, "page_size=24"),
        ({"geometry": dataclasses.replace(geometry, head_dim=512)}, "head_dim=512"),
        ({"geometry": dataclasses.replace(geometry, dtype=jnp.dtype(jnp.int8))}, "32 or more"),
        ({"dtype": jnp.dtype(jnp.float16)}, "dtype=float16"),
        ({"geometry": PageGeometry(1, 128, 64, 256, jnp.dtype(jnp.float32)), "heads": 64}, "of VMEM"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            BACKEND.require(dataclasses.replace(problem, **change))


@pytest.mark.interpret
def test_padding_is_not_touched() -> None:
    """More padding changes no work: the loops end where the rows in use end."""
    case = Case(rows=MIXED, padding_tokens=40, padding_rows=9, spare_columns=5)
    holds(case)
