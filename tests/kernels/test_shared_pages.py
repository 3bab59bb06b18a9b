"""Pages of keys alone, whose first dimensions are the values: multi-head latent attention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import (
    HEAD_MAJOR,
    INTERLEAVED,
    PageGeometry,
    PageLayout,
    Problem,
    RaggedBatch,
    as_backend,
    check,
    choose_backend,
    paged_attention,
)
from pallas_kernels.paged_attention.cases import SHARED

PAGE_SIZE, COLUMNS, HEADS, KEY, VALUE = 4, 12, 3, 24, 16


def problem(platform: str = "cpu") -> Problem:
    geometry = PageGeometry(1, PAGE_SIZE, 1, KEY, jnp.dtype("float32"), shared=True)
    return Problem(platform, "H100" if platform == "gpu" else "", HEADS, geometry, jnp.dtype("float32"))


def build(rows: list[tuple[int, int]], padding: int, dtype: str) -> tuple[dict[str, np.ndarray], RaggedBatch]:
    """Rows of (new tokens, all keys); keys by row and position, and pages that are NaN where nothing is."""
    random = np.random.default_rng(0)
    counts = [new for new, _ in rows]
    tokens = sum(counts) + padding
    context = random.normal(size=(len(rows), COLUMNS * PAGE_SIZE, KEY)).astype(jnp.dtype(dtype))
    pages = np.full((1 + len(rows) * COLUMNS, PAGE_SIZE, 1, KEY), np.nan, jnp.dtype(dtype))
    table = 1 + random.permutation(len(rows) * COLUMNS).reshape(len(rows), COLUMNS).astype(np.int32)
    k = np.zeros((tokens, 1, KEY), jnp.dtype(dtype))
    first = 0
    for row, (new, keys) in enumerate(rows):
        for position in range(keys - new):
            place = pages[table[row, position // PAGE_SIZE], position % PAGE_SIZE]
            place[0] = context[row, position]
        k[first : first + new, 0] = context[row, keys - new : keys]
        first += new
    q = random.normal(size=(tokens, HEADS, KEY)).astype(jnp.dtype(dtype))
    batch = RaggedBatch(
        jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        jnp.asarray([keys for _, keys in rows], jnp.int32),
        jnp.asarray(table),
        jnp.asarray([sum(new == 1 for new in counts), len(rows)], jnp.int32),
    )
    return {"q": q, "k": k, "pages": pages, "context": context}, batch


def expect(arrays: dict[str, np.ndarray], rows: list[tuple[int, int]]) -> np.ndarray:
    """Token by token in float64."""
    q = arrays["q"].astype(np.float64)
    out = np.zeros((*q.shape[:2], VALUE))
    token = 0
    for row, (new, keys) in enumerate(rows):
        for position in range(keys - new, keys):
            seen = arrays["context"][row, : position + 1].astype(np.float64)
            scores = np.exp(0.3 * q[token] @ seen.T)
            out[token] = scores / scores.sum(axis=1, keepdims=True) @ seen[:, :VALUE]
            token += 1
    return out


def test_check_says_who_refuses() -> None:
    report = check("cpu", cases=SHARED)
    assert {outcome.status for outcome in report.outcomes} == {"refused"}
    assert "multi-head latent attention" in report.outcomes[0].detail


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [[(1, 9), (1, 1), (5, 5), (7, 30)], [(1, 40), (37, 41), (45, 48)]], ids=str)
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_values_are_the_keys_first_dimensions(backend: str, rows: list[tuple[int, int]], dtype: str) -> None:
    """Few tokens, and more than are taken one by one."""
    arrays, batch = build(rows, 3, dtype)
    layout = as_backend(backend).layout
    pages = jnp.asarray(arrays["pages"])
    if layout is HEAD_MAJOR:
        kept = layout.array(PageGeometry(len(pages), PAGE_SIZE, 1, KEY, jnp.dtype(dtype), shared=True))
        bits = pages if kept.dtype == pages.dtype else jax.lax.bitcast_convert_type(pages, kept.dtype)
        pages = bits.reshape(kept.shape)
    q, k = jnp.asarray(arrays["q"]), jnp.asarray(arrays["k"])

    @jax.jit
    def attend(q: Any, k: Any, pages: Any, batch: RaggedBatch) -> Any:
        return paged_attention(q, k, k[..., :VALUE], pages, batch, scale=0.3, backend=backend)

    out, pages = attend(q, k, pages, batch)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(out.astype(jnp.float32), expect(arrays, rows), atol=tolerance)
    for row, (_, keys) in enumerate(rows):
        flat = np.asarray(pages).reshape(-1, KEY).view(jnp.dtype(dtype))
        places = [batch.page_table[row, p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(keys)]
        np.testing.assert_array_equal(flat[np.asarray(places)], arrays["context"][row, :keys])


def test_a_page_takes_half_as_much() -> None:
    one = problem().geometry
    two = PageGeometry(1, PAGE_SIZE, 1, KEY, jnp.dtype("float32"))
    assert one.bytes_per_page == two.bytes_per_page // 2 == PAGE_SIZE * KEY * 4
    for layout in (INTERLEAVED, HEAD_MAJOR):
        pool = layout.array(one)
        assert pool.size * pool.dtype.itemsize == one.bytes_per_page
        assert layout.read(jnp.zeros(pool.shape, pool.dtype), 1, KEY) == one


@pytest.mark.parametrize("layout", [INTERLEAVED, HEAD_MAJOR], ids=["interleaved", "head-major"])
def test_a_page_holds_no_third_vector(layout: PageLayout) -> None:
    shape = list(layout.array(problem().geometry).shape)
    shape[2] = 3
    assert layout.read(jnp.zeros(shape), 1, KEY) is None


@pytest.mark.parametrize(
    ("shared", "value_dim", "message"),
    [
        (True, KEY + 1, rf"v\[2, 1, {KEY + 1}\]: must be \[2, 1, 1 to {KEY}\]"),
        (False, VALUE, rf"v\[2, 1, {VALUE}\]: must be \[2, 1, {KEY}\]"),
    ],
)
def test_values_that_do_not_go_with_pages(shared: bool, value_dim: int, message: str) -> None:
    geometry = PageGeometry(2, PAGE_SIZE, 1, KEY, jnp.dtype("float32"), shared=shared)
    pages = jnp.zeros(INTERLEAVED.array(geometry).shape)
    _, batch = build([(2, 2)], 0, "float32")
    x = jnp.zeros((2, 1, KEY + 1))
    with pytest.raises(ValueError, match=message):
        paged_attention(
            x[..., :KEY], x[..., :KEY], x[..., :value_dim], pages, batch, scale=1.0, backend="reference"
        )


def test_keys_that_are_values_have_no_scales() -> None:
    """Values would be multiplied by one scale after keys were divided by another."""
    geometry = PageGeometry(2, PAGE_SIZE, 1, KEY, jnp.dtype("float8_e4m3fn"), shared=True)
    pages = jnp.zeros(INTERLEAVED.array(geometry).shape, geometry.dtype)
    _, batch = build([(2, 2)], 0, "float32")
    x = jnp.zeros((2, 1, KEY))
    with pytest.raises(NotImplementedError, match="k_scale, v_scale: pages of keys alone"):
        paged_attention(
            x, x, x[..., :VALUE], pages, batch, scale=1.0, k_scale=jnp.ones(1), backend="reference"
        )


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_kernels_of_keys_and_values_refuse(platform: str) -> None:
    with pytest.raises(NotImplementedError, match="multi-head latent attention: xla serves them"):
        choose_backend(platform, [problem(platform)])
    assert choose_backend("auto", [problem(platform)]).backend.name == "xla"
