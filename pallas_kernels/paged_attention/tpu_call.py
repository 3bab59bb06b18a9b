"""The call of the TPU kernel that attends: its arguments, results and buffers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.paged_attention.batch import RaggedBatch
from pallas_kernels.paged_attention.tpu_attend import Attend
from pallas_kernels.paged_attention.tpu_blocks import vmem_bytes, vmem_limit
from pallas_kernels.paged_attention.tpu_copies import Copies, Refs
from pallas_kernels.paged_attention.tpu_layout import LANES, SUBLANES
from pallas_kernels.paged_attention.tpu_plan import Plan


def attend_rows(
    plan: Plan,
    q: Float[Array, "tokens*rows 128"],
    new: Int32[Array, "tokens*rows 128"] | None,
    pages: Shaped[Array, "pages kv_heads page_size lanes"],
    batch: RaggedBatch,
    out: Float[Array, "tokens*rows 128"] | None,
    sinks: Float[Array, " heads"] | None,
    *,
    device_kind: str,
    interpret: Any,
) -> tuple[Float[Array, "tokens*rows 128"], Shaped[Array, "pages kv_heads page_size lanes"]]:
    """Attends the rows of one token and writes their keys and values, or attends the rows after them.

    Args:
        q: as `query_rows` makes them.
        new: as `new_rows` makes them, for rows of one token.
        out: what the rows of one token left, for the rows after them.

    Returns:
        The output in the form of `q`, written only where the rows attended are, and the pages.
    """
    scalars = (batch.query_start, batch.kv_lens, batch.page_table.reshape(-1), batch.num_rows)
    arrays = {"q": q, "pages": pages}
    if sinks is not None:
        arrays["sinks"] = _spread(plan, sinks)
    if plan.decode:
        assert new is not None
        arrays["new"] = new
    else:
        assert out is not None
        arrays["out"] = out
    results = {"out": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    if plan.decode:
        results["pages"] = jax.ShapeDtypeStruct(pages.shape, pages.dtype)
    buffers = _buffers(plan)
    names = ("query_start", "kv_lens", "page_table", "num_rows", *arrays, *results, *buffers)

    def body(*refs: Any) -> None:
        # of an array that is both, the output's name stands
        given = Refs(**dict(zip(names, refs, strict=True)))
        first, end = given.num_rows[0], given.num_rows[1]
        if plan.decode:
            first, end = jnp.zeros_like(first), first
        Attend(plan, given, Copies(plan, given, end)).run(first)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    vector = pl.BlockSpec(memory_space=pltpu.VMEM)
    places = {name: len(scalars) + i for i, name in enumerate(arrays)}
    computed = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[vector if name == "sinks" else anywhere for name in arrays],
            out_specs=[anywhere for _ in results],
            scratch_shapes=list(buffers.values()),
        ),
        out_shape=list(results.values()),
        input_output_aliases={places[name]: i for i, name in enumerate(results) if name in places},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_limit(vmem_bytes(plan), device_kind)),
        interpret=interpret,
        name="attend_decode_rows" if plan.decode else "attend_rows",
    )(*scalars, *arrays.values())
    return computed[0], computed[1] if plan.decode else pages


def _spread(plan: Plan, sinks: Float[Array, " heads"]) -> Float[Array, "padded 128"]:
    """Each head's sink in a row of its own, with as many rows behind as a load of a last head may take."""
    padding = plan.matrix_rows + -plan.heads % SUBLANES
    rows = jnp.pad(sinks.astype(jnp.float32), (0, padding))[:, None]
    return jnp.broadcast_to(rows, (plan.heads + padding, LANES))


def _buffers(plan: Plan) -> dict[str, Any]:
    """The kernel's buffers and semaphores by their names in `Refs`."""
    slots, operand = plan.blocks.slots, plan.lanes.operand
    tokens = plan.blocks.queries * plan.query_rows
    # a load of a last head's rows may go on past the token's own
    spare = plan.matrix_rows * plan.folds if plan.decode else 0
    softmax = pltpu.VMEM((plan.kv_heads, plan.matrix_rows, LANES), jnp.float32)
    buffers: dict[str, Any] = {
        "kv_slots": pltpu.VMEM((slots, plan.kv_heads, plan.keys_in_block, plan.lanes.row), plan.dtype),
        "q_slots": pltpu.VMEM((slots, tokens + spare, LANES), jnp.float32),
        "queries": pltpu.VMEM((plan.kv_heads, plan.matrix_rows, operand), plan.product),
        "top": softmax,
        "total": softmax,
        "sums": pltpu.VMEM((plan.kv_heads, plan.matrix_rows, operand), jnp.float32),
        "results": pltpu.VMEM((2, tokens, LANES), jnp.float32),
        "fetched": pltpu.SemaphoreType.DMA((slots,)),
        "stored": pltpu.SemaphoreType.DMA,
    }
    if plan.decode:
        buffers |= {
            "new_slots": pltpu.VMEM((slots, plan.new_rows, LANES), jnp.int32),
            "patches": pltpu.VMEM((2, plan.kv_heads, plan.tile_rows, plan.lanes.row), plan.dtype),
            "patched": pltpu.SemaphoreType.DMA,
        }
    return buffers
