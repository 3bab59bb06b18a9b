"""Every backend on the same cases, against float64."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import (
    PageGeometry,
    interleaved,
    list_backends,
    paged_attention,
    register_backend,
    resolve_backend,
)
from pallas_kernels.paged_attention.cases import CORNERS, Case, build

BACKENDS = ("reference", "xla")


def pack(pages: np.ndarray, backend: str, dtype: jnp.dtype) -> jax.Array:
    """Logical pages in the backend's own packing."""
    if resolve_backend(backend).layout is interleaved:
        return jnp.asarray(pages, dtype)
    count, size, heads, dim = pages.shape
    packed = jnp.asarray(pages.reshape(count, size, heads // 2, 2, dim).transpose(2, 0, 3, 1, 4), dtype)
    return jax.lax.bitcast_convert_type(packed, jnp.uint16) if dtype == jnp.bfloat16 else packed


def unpack(pages: jax.Array, backend: str, dtype: jnp.dtype) -> np.ndarray:
    """The inverse of `pack`."""
    if resolve_backend(backend).layout is not interleaved:
        if dtype == jnp.bfloat16:
            pages = jax.lax.bitcast_convert_type(pages, jnp.bfloat16)
        heads, count, _, size, dim = pages.shape
        pages = pages.transpose(1, 3, 0, 2, 4).reshape(count, size, 2 * heads, dim)
    return np.asarray(pages.astype(jnp.float32))


@partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "backend"), donate_argnames="pages")
def step(q, k, v, pages, batch, sinks, **options):
    return paged_attention(q, k, v, pages, batch, sinks=sinks, **options)


def check(case: Case, backend: str, dtype: jnp.dtype, tolerance: float) -> None:
    arrays = build(case)
    cast = partial(jnp.asarray, dtype=dtype)
    geometry = PageGeometry(len(arrays.pages), case.page_size, case.kv_heads, case.head_dim, jnp.dtype(dtype))
    pages = pack(arrays.pages, backend, dtype)
    expected = resolve_backend(backend).layout(geometry).array
    assert (pages.shape, pages.dtype) == (expected.shape, expected.dtype)
    out, pages = step(
        cast(arrays.q), cast(arrays.k), cast(arrays.v), pages, arrays.batch,
        None if arrays.sinks is None else jnp.asarray(arrays.sinks, jnp.float32),
        scale=case.scale, sliding_window=case.sliding_window, soft_cap=case.soft_cap, backend=backend,
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(out, np.float64), arrays.out, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(
        unpack(pages, backend, dtype), np.asarray(cast(arrays.pages_after).astype(jnp.float32))
    )


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_corner_in_float32(backend: str, name: str) -> None:
    check(CORNERS[name], backend, jnp.float32, 1e-5)


@pytest.mark.parametrize("name", ["mixed", "all at once", "several tiles"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_corner_in_bfloat16(backend: str, name: str) -> None:
    check(CORNERS[name], backend, jnp.bfloat16, 4e-2)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    prefix_pages = draw(st.integers(0, 2))
    decode = draw(st.lists(st.integers(17, 60), max_size=4))
    prefill = draw(st.lists(st.tuples(st.integers(2, 20), st.integers(16, 40)), max_size=3))
    kv_heads = draw(st.sampled_from([1, 2]))
    return Case(
        rows=(*((1, kv) for kv in decode), *((n, n + old) for n, old in prefill)),
        heads=kv_heads * draw(st.sampled_from([1, 3])),
        kv_heads=kv_heads,
        page_size=8,
        padding_tokens=draw(st.integers(1, 4)),
        padding_rows=draw(st.integers(1, 3)),
        sliding_window=draw(st.none() | st.integers(1, 40)),
        soft_cap=draw(st.none() | st.just(1.5)),
        sinks=draw(st.booleans()),
        shared_prefix_pages=prefix_pages,
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=12)
@given(cases())
def test_any_case(case: Case) -> None:
    check(case, "xla", jnp.float32, 1e-5)


def test_pages_are_updated_in_place() -> None:
    """Ten times the pool must not mean more temporaries, and the pool's bytes are aliased."""

    def compiled(num_pages: int) -> tuple[Any, jax.ShapeDtypeStruct]:
        geometry = PageGeometry(num_pages, 16, 3, 64, jnp.dtype(jnp.bfloat16))
        layout = resolve_backend("xla").layout(geometry).array
        case = Case(rows=((1, 30), (1, 9), (1, 20)), heads=9, kv_heads=3, head_dim=64, padding_tokens=1)
        arrays = build(case)
        args = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (arrays.q, arrays.k, arrays.v)]
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays.batch)
        options = {"scale": 0.1, "sliding_window": None, "soft_cap": None, "backend": "xla"}
        return step.lower(*args, layout, batch, None, **options).compile().memory_analysis(), layout

    small, _ = compiled(1000)
    large, layout = compiled(10_000)
    assert large.alias_size_in_bytes >= layout.size * layout.dtype.itemsize
    assert large.temp_size_in_bytes == small.temp_size_in_bytes < 4e6


def test_own_backend() -> None:
    """A function of one's own is a backend like any other."""
    reference = resolve_backend("reference")

    def doubled(*args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        out, pages = reference.attend(*args, **options)
        return 2 * out, pages

    register_backend("mine", doubled)
    assert "mine" in list_backends()
    arrays = build(CORNERS["mixed"])
    q, k, v, pages = (jnp.asarray(x, jnp.float32) for x in (arrays.q, arrays.k, arrays.v, arrays.pages))
    out, _ = paged_attention(q, k, v, pages, arrays.batch, scale=CORNERS["mixed"].scale, backend="mine")
    np.testing.assert_allclose(out, 2 * arrays.out, atol=1e-4)
    with pytest.raises(ValueError, match="exists already"):
        register_backend("mine", reference.attend)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"'cuda'.*reference"):
        resolve_backend("cuda")
    arrays = build(dataclasses.replace(CORNERS["mixed"], heads=4, kv_heads=2))
    q, k, v, pages = (jnp.asarray(x, jnp.float32) for x in (arrays.q, arrays.k, arrays.v, arrays.pages))
    with pytest.raises(ValueError, match="multiple of kv_heads=2"):
        paged_attention(q[:, :3], k, v, pages, arrays.batch, scale=1.0)
