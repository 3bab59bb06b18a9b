"""The C++ kernel for CPU: the op's cases, and what is special to it."""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.native import Library
from pallas_kernels.paged_attention import PageGeometry, Problem, choose_backend, cpu
from pallas_kernels.paged_attention.cases import KEYS_AND_VALUES, Case, build, strategy
from pallas_kernels.paged_attention.check import check_case, run_case

DTYPES = (
    ("float32", None),
    ("float32", "bfloat16"),
    ("float32", "int8"),
    ("float32", "float8_e4m3fn"),
    ("bfloat16", None),
    ("bfloat16", "float32"),
    ("bfloat16", "int8"),
    ("bfloat16", "float8_e4m3fn"),
)
SPLIT = {
    "one row, bfloat16": Case(
        rows=((1, 2100),), heads=3, kv_heads=1, page_size=16, dtype="bfloat16", padding_tokens=1
    ),
    "one row, all at once": Case(
        rows=((1, 2100),), page_size=16, sliding_window=1500, soft_cap=3.0, sinks=True
    ),
    "a chunk": Case(rows=((5, 1801),), page_size=16, sinks=True),
}
"""Fewer tasks than threads can share: contexts are cut, and the parts merged."""


@pytest.mark.parametrize("name", KEYS_AND_VALUES)
def test_corner(name: str) -> None:
    check_case(KEYS_AND_VALUES[name], cpu.BACKEND, cpu.paged_attention_cpu)


@pytest.mark.parametrize("name", SPLIT)
def test_split_context(name: str) -> None:
    check_case(SPLIT[name], cpu.BACKEND, cpu.paged_attention_cpu)


@settings(max_examples=8)
@given(strategy(DTYPES, head_dims=(16, 24, 64, 80), page_sizes=(1, 2, 4, 8, 16, 64)))
def test_any_case(case: Case) -> None:
    check_case(case, cpu.BACKEND, cpu.paged_attention_cpu)


def test_nan_stays_in_its_row() -> None:
    """A row whose keys went bad answers NaN, and no other row does."""
    case = Case(rows=((1, 30), (1, 25)), page_size=16, padding_tokens=0)
    arrays = build(case)
    arrays.k[0, 0, 0] = np.nan
    out, _ = run_case(case, arrays, cpu.BACKEND, cpu.paged_attention_cpu)
    assert np.isnan(out[0, :2]).all()
    assert not np.isnan(out[0, 2:]).any()
    assert not np.isnan(out[1]).any()


MALFORMED = {
    "page beyond the pool": ("page_table", (1, 2), 10_000, r"page_table\[1, 2\] is 10000 of \d+ pages"),
    "negative page": ("page_table", (0, 0), -1, r"page_table\[0, 0\] is -1 of \d+ pages"),
    "length beyond the table": ("kv_lens", 1, 10_000, r"kv_lens\[1\] is 10000, and its page table holds"),
    "length less than the tokens": ("kv_lens", 2, 5, r"kv_lens\[2\] is 5, less than the row's 7 new tokens"),
    "negative length": ("kv_lens", 0, -1, r"kv_lens\[0\] is -1"),
    "tokens beyond the step": ("query_start", 3, 1000, r"query_start\[2\] .* is 2 to 1000 of 12 tokens"),
    "tokens in disorder": ("query_start", 2, 0, r"query_start\[1\] .* is 1 to 0 of 12 tokens"),
    "tokens that begin late": ("query_start", 0, 1, r"query_start\[0\] is 1, not 0"),
    "rows beyond the batch": ("num_rows", 1, 1000, r"num_rows\[1\] is 1000 of 5 rows"),
    "negative rows": ("num_rows", 1, -1, r"num_rows\[1\] is -1"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_metadata(name: str) -> None:
    """An error that says what and where, instead of touching memory."""
    field, index, value, message = MALFORMED[name]
    case = Case(rows=((1, 20), (1, 33), (7, 21)))
    arrays = build(case)
    entry = getattr(arrays.batch, field).at[index].set(value)
    broken = dataclasses.replace(arrays, batch=arrays.batch._replace(**{field: entry}))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*paged_attention: {message}"):
        run_case(case, broken, cpu.BACKEND, cpu.paged_attention_cpu)


def test_what_is_not_in_use_may_be_malformed() -> None:
    """Rows not in use, and the table's entries beyond a row's keys or before its window, are not read."""
    case = Case(rows=((1, 30), (3, 25)), sliding_window=4, padding_rows=2)
    arrays = build(case)
    batch = arrays.batch
    table = np.array(batch.page_table)
    table[0, :3] = table[0, 4:] = table[2:] = -7
    batch = batch._replace(
        page_table=jnp.asarray(table),
        kv_lens=batch.kv_lens.at[2:].set(-9),
        query_start=batch.query_start.at[3:].set(99),
    )
    out, _ = run_case(case, dataclasses.replace(arrays, batch=batch), cpu.BACKEND, cpu.paged_attention_cpu)
    np.testing.assert_allclose(out, arrays.out, atol=1e-5)


def layers(count: int, q: Any, k: Any, v: Any, pools: tuple[Any, ...], batch: Any) -> tuple[Any, Any]:
    """Several layers that thread their pools through, as a model does."""
    options = {"sliding_window": None, "soft_cap": None, "sinks": None, "k_scale": None, "v_scale": None}
    after = []
    for pool in pools[:count]:
        q, pool = cpu.paged_attention_cpu(q, k, v, pool, batch, scale=0.1, **options)
        after.append(pool)
    return q, tuple(after)


@pytest.mark.parametrize("page_dtype", ["bfloat16", "float32", "int8", "float8_e4m3fn"])
def test_pages_are_updated_in_place(page_dtype: str) -> None:
    """No copy of a pool in a program of several layers, and temporaries that do not grow with the pool."""
    case = Case(rows=((1, 30), (1, 9), (1, 20)), heads=9, kv_heads=3, dtype="bfloat16")
    arrays = build(case)
    shape = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))

    def compiled(num_pages: int) -> tuple[Any, jax.ShapeDtypeStruct]:
        pool = cpu.BACKEND.layout.array(PageGeometry(num_pages, 16, 3, 64, jnp.dtype(page_dtype)))
        step = jax.jit(partial(layers, 3), donate_argnums=3)
        args = (*shape((arrays.q, arrays.k, arrays.v)), (pool,) * 3, shape(arrays.batch))
        return step.lower(*args).compile(), pool

    small, _ = compiled(1000)
    large, pool = compiled(10_000)
    memory = large.memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * pool.size * pool.dtype.itemsize
    assert memory.temp_size_in_bytes == small.memory_analysis().temp_size_in_bytes < 1e5
    dims = ",".join(map(str, pool.shape))
    users = {m[1] for m in re.finditer(rf"= \w+\[{dims}\]\S* ([\w-]+)\(", large.as_text())}
    assert users <= {"parameter", "get-tuple-element", "custom-call"}


def test_shard_map_over_heads() -> None:
    """Each device works on its own kv heads: a cut pool is a pool of fewer heads."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    case = Case(rows=((1, 30), (1, 5), (6, 20)), heads=6, kv_heads=2, sinks=True)
    heads, by_head = PartitionSpec(None, "x"), PartitionSpec("x")
    mesh = Mesh(np.array(jax.devices()[:2]), "x")

    def attend(q: Any, k: Any, v: Any, pages: Any, batch: Any, *, sinks: Any, **options: Any) -> Any:
        local = partial(
            cpu.paged_attention_cpu, scale=options["scale"], sliding_window=None, soft_cap=None,
            k_scale=None, v_scale=None,
        )  # fmt: skip
        sharded = jax.shard_map(
            lambda q, k, v, pages, batch, sinks: local(q, k, v, pages, batch, sinks=sinks),
            mesh=mesh,
            in_specs=(heads, heads, heads, by_head, PartitionSpec(), by_head),
            out_specs=(heads, by_head),
            check_vma=False,
        )
        return sharded(q, k, v, pages, batch, sinks)

    check_case(case, cpu.BACKEND, attend)


def problem(**changes: Any) -> Problem:
    geometry = PageGeometry(1, 16, 3, 64, jnp.dtype("bfloat16"))
    return dataclasses.replace(Problem("cpu", "cpu", 9, geometry, jnp.dtype("bfloat16")), **changes)


def test_chosen_first_on_cpu() -> None:
    assert choose_backend("auto", [problem()]).backend is cpu.BACKEND


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next backend serves, and the choice says why."""
    source = dataclasses.replace(cpu.LIBRARY.source, compiler="no-such-compiler")
    monkeypatch.setattr(cpu, "LIBRARY", Library(source, ("PagedAttention",)))
    choice = choose_backend("auto", [problem()])
    assert choice.backend.name == "xla"
    assert "no C++ compiler: no-such-compiler not found" in str(choice)
    with pytest.raises(NotImplementedError, match="no C\\+\\+ compiler"):
        choose_backend("cpu", [problem()])


def test_refusals() -> None:
    for changes, message in (
        ({"platform": "gpu"}, "platform gpu"),
        ({"dtype": jnp.dtype("float16")}, "queries of float16"),
        ({"geometry": PageGeometry(1, 16, 3, 64, jnp.dtype("float16"))}, "pages of float16"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            cpu.require(problem(**changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_the_same_in_any_company(dtype: str) -> None:
    """To the last bit: alone its context is cut into tasks for all threads, among others it is not."""
    others = tuple((1, 50 + i) for i in range(9))
    case = Case(
        rows=((1, 2500), *others, (9, 1700)), page_size=16, sliding_window=2300, sinks=True, dtype=dtype
    )
    arrays = build(case)
    together, _ = run_case(case, arrays, cpu.BACKEND, cpu.BACKEND.attend)
    batch = arrays.batch
    alone = batch._replace(
        query_start=jnp.minimum(batch.query_start, 1), num_rows=jnp.asarray([1, 1], jnp.int32)
    )
    out, _ = run_case(case, dataclasses.replace(arrays, batch=alone), cpu.BACKEND, cpu.BACKEND.attend)
    np.testing.assert_array_equal(out[0], together[0])
    assert not out[1:].any()
