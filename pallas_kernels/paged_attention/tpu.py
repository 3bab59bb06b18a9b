"""Paged attention on TPU by Pallas kernels: one for rows of one token, two for the rows after them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.devices import current_device
from pallas_kernels.paged_attention import tpu_blocks
from pallas_kernels.paged_attention.backend import Backend
from pallas_kernels.paged_attention.batch import RaggedBatch
from pallas_kernels.paged_attention.problem import Problem, require_values
from pallas_kernels.paged_attention.scales import Scale, to_stored
from pallas_kernels.paged_attention.tpu_blocks import check_smem, make_plan
from pallas_kernels.paged_attention.tpu_layout import (
    SIDE_BY_SIDE,
    Lanes,
    new_rows,
    output_of_rows,
    query_rows,
)
from pallas_kernels.paged_attention.tpu_plan import Blocks
from pallas_kernels.tuning import Tunable

Pages = Shaped[Array, "pages kv_heads page_size lanes"]

PAGE_SIZES = (8, 16, 32, 64, 128)
SMALLEST_PAGE_OF_8_BITS = 32
"""Rows of 8 bits share registers 32 at a time, and copies into them begin at whole registers."""
LARGEST_HEAD = 256
FLOATS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
STORED = (*FLOATS, jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))


def require(problem: Problem) -> None:
    """Whether the kernels serve a problem.

    Raises:
        NotImplementedError: they do not; the message says why.
    """
    if problem.platform != "tpu":
        raise NotImplementedError(f"platform {problem.platform}: serves tpu")
    require_values(problem)
    geometry = problem.geometry
    _require_shapes(geometry.page_size, geometry.head_dim, problem.dtype, geometry.dtype)
    for decode in (True, False):
        make_plan(
            decode=decode, heads=problem.heads, kv_heads=geometry.kv_heads, lanes=Lanes(geometry.head_dim),
            page_size=geometry.page_size, columns=1, dtype=geometry.dtype, queries=problem.dtype,
            sliding_window=problem.sliding_window, soft_cap=problem.soft_cap, tokens=1, rows=1,
            device_kind=problem.device_kind, blocks=None,
        )  # fmt: skip


def _require_shapes(page_size: int, head_dim: int, dtype: jnp.dtype, stored: jnp.dtype) -> None:
    if page_size not in PAGE_SIZES:
        raise NotImplementedError(f"page_size={page_size}: the TPU kernel takes {PAGE_SIZES}")
    if stored.itemsize == 1 and page_size < SMALLEST_PAGE_OF_8_BITS:
        least = SMALLEST_PAGE_OF_8_BITS
        raise NotImplementedError(
            f"page_size={page_size} with pages of {stored}: the TPU kernel takes {least} or more"
        )
    if head_dim > LARGEST_HEAD:
        raise NotImplementedError(f"head_dim={head_dim}: the TPU kernel takes up to {LARGEST_HEAD}")
    if dtype not in FLOATS:
        raise NotImplementedError(f"dtype={dtype}: the TPU kernel takes bfloat16 and float32")
    if stored not in STORED:
        raise NotImplementedError(f"pages of {stored}: the TPU kernel takes {', '.join(map(str, STORED))}")


def attend(
    q: Float[Array, "tokens heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads dim"],
    pages: Pages,
    batch: RaggedBatch,
    /,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    decode_blocks: Blocks | None = None,
    rest_blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "tokens heads dim"], Pages]:
    """See `paged_attention`; pages are packed as `SIDE_BY_SIDE`.

    Args:
        decode_blocks, rest_blocks: of rows of one token and of those after them; None: the tuned ones of this
            chip and shape, or the default.
        interpret: see `pl.pallas_call`.

    Raises:
        NotImplementedError: the shapes are not served.
        ValueError: the page table does not fit into scalar memory.
    """
    from pallas_kernels._compat import raise_on_races
    from pallas_kernels.paged_attention.tpu_call import attend_rows
    from pallas_kernels.paged_attention.tpu_write import write_rows

    tokens, heads, head_dim = q.shape
    kv_heads, page_size = k.shape[1], pages.shape[2]
    rows, columns = batch.page_table.shape
    _require_shapes(page_size, head_dim, jnp.dtype(q.dtype), jnp.dtype(pages.dtype))
    check_smem(rows, columns)

    device_kind = "" if interpret else current_device()[1]
    make = partial(
        make_plan, heads=heads, kv_heads=kv_heads, lanes=Lanes(head_dim), page_size=page_size,
        columns=columns, dtype=jnp.dtype(pages.dtype), queries=jnp.dtype(q.dtype),
        sliding_window=sliding_window, soft_cap=soft_cap, tokens=tokens, rows=rows, device_kind=device_kind,
    )  # fmt: skip
    one, rest = make(decode=True, blocks=decode_blocks), make(decode=False, blocks=rest_blocks)

    repeated = None if k_scale is None else jnp.repeat(k_scale.astype(jnp.float32), heads // kv_heads)
    queries = query_rows(q, scale if repeated is None else scale * repeated, after=rest.blocks.queries)
    new = new_rows(to_stored(k, pages.dtype, k_scale), to_stored(v, pages.dtype, v_scale), around=page_size)
    options = {"device_kind": device_kind, "interpret": interpret}
    checked = raise_on_races if interpret else lambda results: results
    out, pages = checked(attend_rows(one, queries, new, pages, batch, None, sinks, **options))
    pages = checked(write_rows(rest, new, pages, batch, **options))
    out, pages = checked(attend_rows(rest, queries, None, pages, batch, out, sinks, **options))

    result = output_of_rows(out, tokens, heads, head_dim)
    if v_scale is not None:
        result = result * jnp.repeat(v_scale.astype(jnp.float32), heads // kv_heads)[:, None]
    in_use = jnp.arange(tokens) < batch.query_start[batch.num_rows[1]]
    return jnp.where(in_use[:, None, None], result, 0.0).astype(q.dtype), pages


def attend_interpreted(*args: Any, **options: Any) -> tuple[Array, Array]:
    """`attend` in Pallas' TPU interpreter on the CPU, with its race detector on.

    Copies happen as late as they may, and memory that nothing was written to holds NaN.

    Raises:
        RuntimeError: when the result is computed, if two accesses raced.
    """
    from pallas_kernels._compat import tpu_interpreter

    return attend(*args, **options, interpret=tpu_interpreter())


def _tuning_key(problem: Problem) -> dict[str, str | int]:
    pages = problem.geometry
    return tpu_blocks.tuning_key(problem.heads, pages.kv_heads, pages.head_dim, pages.page_size, pages.dtype)


def _with_blocks(phase: str, blocks: dict[str, int]) -> Callable[..., tuple[Array, Array]]:
    name = "decode_blocks" if phase == "decode" else "rest_blocks"
    return partial(attend, **{name: tpu_blocks.as_blocks(blocks)})


def _worth_trying(problem: Problem, phase: str, blocks: dict[str, int]) -> bool:
    """Products of 128 rows at least, and no more keys in one than there are in a block of pages."""
    group = problem.heads // problem.geometry.kv_heads
    queries = blocks.get("queries", 1) * group
    enough = phase == "decode" or 128 <= queries <= 2048
    return enough and 128 <= blocks["keys"] <= blocks["pages"] * problem.geometry.page_size <= 8192


TUNABLE = Tunable(tpu_blocks.TUNABLE, _tuning_key, _with_blocks, _worth_trying)
BACKEND = Backend("tpu", attend, SIDE_BY_SIDE, "tpu", require, attend_interpreted, tunable=TUNABLE)
