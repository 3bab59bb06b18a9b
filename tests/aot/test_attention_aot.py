"""Paged attention compiled for chips that are not there: in place, without copies, within their memories."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from aot_cases import MAX_MODEL_LEN, NUM_PAGES, PAGE_SIZE, ROWS, Case, attention_cases
from aot_records import KERNELS, Result, check_kernel, compile_lowered
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.paged_attention import (
    Backend,
    PageGeometry,
    Problem,
    RaggedBatch,
    as_backend,
    paged_attention,
)
from pallas_kernels.targets import Target

pytestmark = pytest.mark.aot


def geometry(case: Case) -> PageGeometry:
    """Of the pool, all devices together."""
    model = case.model
    shared = model.value_dim is not None
    return PageGeometry(NUM_PAGES, PAGE_SIZE, model.kv_heads, model.head_dim, jnp.dtype(case.pages), shared)


def problem(case: Case) -> Problem:
    """What one device has to do."""
    chip, whole = Target.parse(case.target).chip, geometry(case)
    local = replace(whole, kv_heads=whole.kv_heads // case.devices)
    heads = case.model.heads // case.devices
    return Problem(
        chip.platform, chip.device_kind, heads, local, jnp.dtype(jnp.bfloat16), case.model.sliding_window
    )


def lower(case: Case, backend: Backend, *, spoil: bool = False) -> tuple[jax.stages.Lowered, int]:
    """The program, and the bytes of its pool on each device; `spoil` reads the old pages after the update."""
    model = case.model
    mesh = Target.parse(case.target).mesh((case.devices,), ("tensor",))
    pool = backend.layout.array(geometry(case))
    cut = [None] * len(pool.shape)
    cut[backend.layout.heads_axis] = "tensor"
    heads, pages, whole = PartitionSpec(None, "tensor"), PartitionSpec(*cut), PartitionSpec()

    def shape(dims: tuple[int, ...], dtype: object, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    columns = MAX_MODEL_LEN // PAGE_SIZE
    batch = RaggedBatch(
        *(shape(dims, jnp.int32, whole) for dims in ((ROWS + 1,), (ROWS,), (ROWS, columns), (2,)))
    )
    q = shape((case.tokens, model.heads, model.head_dim), jnp.bfloat16, heads)
    k, v = (
        shape((case.tokens, model.kv_heads, dim), jnp.bfloat16, heads)
        for dim in (model.head_dim, model.value_dim or model.head_dim)
    )
    by_head = PartitionSpec("tensor")
    scales = (shape((model.kv_heads,), jnp.float32, by_head),) * 2 if case.pages != "bfloat16" else ()

    def attend(q, k, v, pages, batch, *scales):
        k_scale, v_scale = scales or (None, None)
        out, after = paged_attention(
            q, k, v, pages, batch, scale=model.head_dim**-0.5, sliding_window=model.sliding_window,
            k_scale=k_scale, v_scale=v_scale, backend=backend,
        )  # fmt: skip
        return (out + pages.reshape(-1)[:1].astype(out.dtype), after) if spoil else (out, after)

    if case.devices > 1:
        specs = (heads, heads, heads, pages, whole, *(by_head for _ in scales))
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(heads, pages), check_vma=False)
    arrays = (q, k, v, shape(pool.shape, pool.dtype, pages), batch, *scales)
    nbytes = math.prod(arrays[3].sharding.shard_shape(pool.shape)) * pool.dtype.itemsize
    with jax.set_mesh(mesh):
        return jax.jit(attend, donate_argnums=3).lower(*arrays), nbytes


def check_in_place(result: Result, pool: int, sums: int = 0) -> None:
    """The pool is updated where it is.

    Args:
        sums: bytes of temporaries that there may be besides.
    """
    assert result.memory.alias_size_in_bytes >= pool
    assert not result.text.copies(pool), "the pool is copied"
    assert result.memory.temp_size_in_bytes < pool + sums


@pytest.mark.parametrize("case", attention_cases(), ids=str)
def test_attention(case: Case) -> None:
    backend = as_backend(case.backend)
    backend.require(problem(case))  # the table holds only what is to be served
    lowered, pool = lower(case, backend)
    result = compile_lowered(Target.parse(case.target), lowered)
    checked = ["pages aliased"]
    if (case.backend, result.target.chip.platform) == ("xla", "tpu"):
        # XLA's scatter on TPU takes a second pool: what to know of the fallback, and no reason to refuse it
        assert result.memory.alias_size_in_bytes >= pool
    else:
        # latent pages are smaller than the queries and sums that XLA keeps in float32
        model = case.model
        sums = case.tokens * model.heads * (model.head_dim + model.value_dim) if model.value_dim else 0
        check_in_place(result, pool, 4 * sums)
        checked.append("no copy of the pool")
    if case.backend in KERNELS:
        assert not result.text.gathers(pool), "the cache is gathered"
        checked += ["no gather from the pool", *check_kernel(result)]
    else:
        # XLA reads pages by gathers, a piece of the context at a time and never max_model_len of it
        context = pool // NUM_PAGES * (MAX_MODEL_LEN // PAGE_SIZE) * min(ROWS, case.tokens)
        largest = max(one.nbytes for one in result.text.gathers())
        assert largest <= context // 8, "whole contexts are gathered"
        checked.append("no gather of whole contexts")
    assert not result.text.collectives()
    result.record("paged_attention", case.backend, case.devices, case.shape, case.pages, *checked)


@pytest.mark.parametrize("target", ["h100:4"])
def test_a_copied_pool_is_found(target: str) -> None:
    case = next(c for c in attention_cases() if (c.backend, c.target) == ("xla", target))
    backend = as_backend("xla")
    lowered, pool = lower(case, backend, spoil=True)
    with pytest.raises(AssertionError):
        check_in_place(compile_lowered(Target.parse(target), lowered), pool)
