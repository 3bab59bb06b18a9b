"""The op, its registry, and the backends that need nothing but XLA."""

import dataclasses
import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels.paged_attention import (
    HEAD_MAJOR,
    INTERLEAVED,
    Backend,
    PageGeometry,
    Problem,
    as_backend,
    check,
    choose_backend,
    list_backends,
    paged_attention,
    register_backend,
)
from pallas_kernels.paged_attention.backends import REGISTRY
from pallas_kernels.paged_attention.cases import CORNERS, Arrays, Case, attend, build, strategy
from pallas_kernels.paged_attention.check import check_case, run_case

PROBLEM = Problem("cpu", "cpu", 4, PageGeometry(1, 8, 2, 64, jnp.dtype("float32")), jnp.dtype("float32"))


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_corner(backend: str, name: str) -> None:
    check_case(CORNERS[name], as_backend(backend), as_backend(backend).attend)


@settings(max_examples=8)
@given(strategy(dtypes=(("float32", None), ("float32", "int8"), ("bfloat16", "float8_e4m3fn"))))
def test_any_case(case: Case) -> None:
    check_case(case, as_backend("xla"), as_backend("xla").attend)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", [INTERLEAVED, HEAD_MAJOR])
def test_packing(layout: Any, dtype: str) -> None:
    geometry = PageGeometry(5, 4, 3, 8, jnp.dtype(dtype))
    pages = (jnp.arange(np.prod(geometry.logical_shape)) % 100).reshape(geometry.logical_shape).astype(dtype)
    packed = layout.pack(pages)
    expected = layout.array(geometry)
    assert (packed.shape, packed.dtype) == (expected.shape, expected.dtype)
    assert layout.read(packed, 3, 8) == geometry
    assert layout.read(packed, 4, 8) is None
    assert (layout.unpack(packed, 3, 8) == pages).all()
    first = jax.lax.slice_in_dim(packed, 0, packed.shape[layout.heads_axis] // 3, axis=layout.heads_axis)
    assert (layout.unpack(first, 1, 8) == pages[:, :, :2]).all()


def test_pages_are_updated_in_place() -> None:
    """Ten times the pool must not mean more temporaries, and the pool's bytes are aliased."""
    step = jax.jit(partial(paged_attention, scale=0.1, backend="xla"), donate_argnums=3)

    def compiled(num_pages: int) -> tuple[Any, jax.ShapeDtypeStruct]:
        pages = HEAD_MAJOR.array(PageGeometry(num_pages, 16, 3, 64, jnp.dtype(jnp.bfloat16)))
        case = Case(rows=((1, 30), (1, 9), (1, 20)), heads=9, kv_heads=3, padding_tokens=1, dtype="bfloat16")
        arrays = build(case)
        args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (arrays.q, arrays.k, arrays.v)]
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays.batch)
        return step.lower(*args, pages, batch).compile().memory_analysis(), pages

    small, _ = compiled(1000)
    large, pages = compiled(10_000)
    assert large.alias_size_in_bytes >= pages.size * pages.dtype.itemsize
    assert large.temp_size_in_bytes == small.temp_size_in_bytes < 4e6


def doubled(*args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    out, pages = as_backend("reference").attend(*args, **options)
    return 2 * out, pages


def test_own_function() -> None:
    """A function of one's own is a backend like any other, and can be held to another definition."""
    few = {name: CORNERS[name] for name in ("mixed", "sinks")}
    report = check(doubled, cases=few)
    assert not report.passed
    assert "2 failed" in str(report)
    assert "off by" in str(report)
    with pytest.raises(AssertionError, match="doubled"):
        report.raise_if_failed()

    def twice(case: Case, q: Any, keys: Any, values: Any, sinks: Any) -> np.ndarray:
        return 2 * attend(case, q, keys, values, sinks)

    check(doubled, cases=few, definition=twice).raise_if_failed()


def test_a_kernel_that_reads_or_writes_too_much_fails() -> None:
    def forgets_to_write(q: Any, k: Any, v: Any, pages: Any, *args: Any, **options: Any) -> Any:
        return as_backend("reference").attend(q, k, v, pages, *args, **options)[0], pages

    def reads_all(*args: Any, **options: Any) -> Any:
        return as_backend("reference").attend(*args, **options | {"sliding_window": None})

    cases = {"window": CORNERS["window shorter than a page"]}
    assert "page" in next(check(forgets_to_write, cases=cases).having("failed")).detail
    assert "nan" in next(check(reads_all, cases=cases).having("failed")).detail


def test_registered_function() -> None:
    register_backend("mine", doubled)
    try:
        assert "mine" in list_backends()
        case = CORNERS["mixed"]
        arrays = build(case)
        out, _ = call_op(case, arrays, "mine")
        np.testing.assert_allclose(out, 2 * arrays.out, atol=1e-4)
        with pytest.raises(ValueError, match="exists already"):
            register_backend("mine", doubled)
    finally:
        del REGISTRY._backends["mine"]


def call_op(case: Case, arrays: Arrays, backend: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    q, k, v, pages = (jnp.asarray(x) for x in (arrays.q, arrays.k, arrays.v, arrays.pages))
    return paged_attention(q, k, v, pages, arrays.batch, scale=case.scale, backend=backend, **options)


def test_a_call_finds_the_backend_whose_packing_it_is() -> None:
    case = CORNERS["mixed"]
    arrays = build(case)
    for pages in (arrays.pages, HEAD_MAJOR.pack(jnp.asarray(arrays.pages))):
        out, _ = call_op(case, dataclasses.replace(arrays, pages=pages), "auto")
        np.testing.assert_allclose(out, arrays.out, atol=1e-5)


def test_the_choice_is_by_order_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(problem: Problem) -> None:
        if problem.sliding_window:
            raise NotImplementedError("sliding_window: not served")

    picky = Backend("picky", doubled, require=refuse)
    REGISTRY.register(picky)
    order = REGISTRY.order
    REGISTRY.order = {"cpu": ("picky", "reference")}
    try:
        windowed = dataclasses.replace(PROBLEM, sliding_window=7)
        with caplog.at_level(logging.INFO, "pallas_kernels"):
            assert choose_backend("auto", [PROBLEM]).backend is picky
            for _ in range(3):
                choice = choose_backend("auto", [PROBLEM, windowed])
                assert choice.backend.name == "reference"
                assert choice.passed_over == (("picky", "sliding_window: not served"),)
        messages = [r.getMessage() for r in caplog.records]
        assert messages == [
            "paged_attention on cpu: picky",
            "paged_attention on cpu: reference (not picky: sliding_window: not served)",
        ]
        with pytest.raises(NotImplementedError, match="sliding_window: not served"):
            choose_backend("picky", [windowed])
        REGISTRY.order = {"cpu": ("picky",)}
        with pytest.raises(NotImplementedError, match="no backend serves this: picky: sliding_window"):
            choose_backend("auto", [windowed])
        with pytest.raises(ValueError, match="no backends for 'npu'; there are for cpu"):
            choose_backend("auto", [dataclasses.replace(PROBLEM, platform="npu")])
    finally:
        REGISTRY.order = order
        del REGISTRY._backends["picky"]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"'cuda'.*auto.*reference"):
        as_backend("cuda")
    case = CORNERS["mixed"]
    arrays = build(case)
    with pytest.raises(ValueError, match="multiple of kv_heads=2"):
        call_op(case, dataclasses.replace(arrays, q=arrays.q[:, :3]), "reference")
    with pytest.raises(ValueError, match="not the packing of backend 'xla'"):
        call_op(case, arrays, "xla")
    with pytest.raises(ValueError, match="packing of none of"):
        call_op(case, dataclasses.replace(arrays, pages=arrays.pages[0]), "auto")
    with pytest.raises(ValueError, match="k_scale: pages of float32 hold values as they are"):
        call_op(case, arrays, "reference", k_scale=jnp.ones(2))
    int8 = build(CORNERS["int8"])
    with pytest.raises(ValueError, match="v_scale: pages of int8 need one"):
        call_op(CORNERS["int8"], int8, "reference", k_scale=jnp.ones(2))
    with pytest.raises(ValueError, match="no interpreted form"):
        check("xla", interpret=True)


def test_padding_touches_nothing() -> None:
    """With no rows at all, outputs are zero and every page keeps its bits."""
    for name in ("reference", "xla"):
        case = CORNERS["no rows"]
        arrays = build(case)
        out, pages = run_case(case, arrays, as_backend(name), as_backend(name).attend)
        assert not out.any()
        assert pages.tobytes() == arrays.pages.tobytes()
