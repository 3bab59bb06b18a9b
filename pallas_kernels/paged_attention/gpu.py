"""Paged attention on Hopper GPUs: rows of one token with their keys divided, the others in tiles.

XLA scatters the step's keys and values into the pages in place; Mosaic GPU kernels attend over them.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.devices import current_device
from pallas_kernels.hopper import ROWS, require_hopper, swizzle_bytes
from pallas_kernels.paged_attention import gpu_plan
from pallas_kernels.paged_attention.backend import Backend
from pallas_kernels.paged_attention.batch import RaggedBatch, locate_tokens
from pallas_kernels.paged_attention.gpu_layout import PageMajor
from pallas_kernels.paged_attention.gpu_plan import Geometry, Plan, Score, plan_ragged, plan_singles
from pallas_kernels.paged_attention.layout import PageGeometry
from pallas_kernels.paged_attention.problem import Problem, require_values
from pallas_kernels.paged_attention.scales import to_stored
from pallas_kernels.tuning import Blocks, Tunable

PAGE_SIZES = (8, 16, 32, 64, 128)
PAGE_DTYPES = ("bfloat16", "int8", "float8_e4m3fn")
HEAD_DIM = 256
"""The most."""
LOG2E = 1.4426950408889634


def paged_attention_gpu(
    q: Float[Array, "tokens heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads dim"],
    pages: Shaped[Array, "pages kv_heads 2 page_size dim"],
    batch: RaggedBatch,
    /,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " heads"] | None,
    k_scale: Float[Array, " kv_heads"] | None,
    v_scale: Float[Array, " kv_heads"] | None,
    singles: Plan | None = None,
    ragged: Plan | None = None,
    decode_blocks: Blocks | None = None,
    prefill_blocks: Blocks | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "tokens heads dim"], Shaped[Array, "pages kv_heads 2 page_size dim"]]:
    """See `paged_attention`; the pages are packed as `PageMajor`.

    Args:
        singles: how the work of rows of one token is cut; None: by their blocks.
        ragged: the same for the other rows.
        decode_blocks, prefill_blocks: of these plans; None: tuned for this card, or computed.
        interpret: parameters of Mosaic GPU's interpreter, to run on the CPU.
    """
    from pallas_kernels.paged_attention import gpu_kernel, gpu_tiles

    tokens, heads, dim = q.shape
    _, kv_heads, _, page_size, _ = pages.shape
    stored = PageGeometry(pages.shape[0], page_size, kv_heads, dim, jnp.dtype(pages.dtype))
    geometry = _geometry(heads, stored, jnp.dtype(q.dtype))
    pages = _write(k, v, pages, batch, k_scale, v_scale)
    keys = batch.page_table.shape[1] * page_size
    kind = "" if interpret else current_device()[1]
    rows = min(tokens, batch.kv_lens.shape[0])
    singles = singles or plan_singles(rows, keys, geometry, kind, decode_blocks)
    ragged = ragged or plan_ragged(tokens, keys, geometry, kind, prefill_blocks)
    queries = q.reshape(tokens, kv_heads, -1, dim).transpose(1, 0, 2, 3).reshape(kv_heads, -1, dim)
    more = 2 * ROWS + -queries.shape[1] % 8  # a tile may reach over the last token; copies want eights
    attend = partial(
        gpu_kernel.attend_tiles,
        jnp.pad(queries, ((0, 0), (0, more), (0, 0))),
        pages.reshape(-1, page_size, dim),
        batch.page_table,
        geometry=geometry,
        score=Score(scale, sliding_window, soft_cap),
        interpret=interpret,
    )
    scales = _scales(k_scale, v_scale, kv_heads)

    def attend_all(tiles: Any, place: Any, plan: Plan) -> Array:
        out, weight = attend(tiles, _sinks_of_rows(sinks, plan, geometry), scales, plan=plan)
        merged = gpu_tiles.merge_splits(out, weight)
        return gpu_tiles.gather_tokens(merged, place, plan.tile_tokens, geometry.group).astype(q.dtype)

    out = attend_all(*gpu_tiles.single_tiles(batch, tokens), singles)
    if tokens > 1:
        tiles, place = gpu_tiles.ragged_tiles(batch, tokens, ragged.tile_tokens)
        out = jnp.where(place.valid[:, None, None], attend_all(tiles, place, ragged), out)
    return out, pages


def _write(
    k: Array, v: Array, pages: Array, batch: RaggedBatch, k_scale: Array | None, v_scale: Array | None
) -> Array:
    """Scatters the step's keys and values, one vector each, into the flat pool."""
    num_pages, kv_heads, _, size, dim = pages.shape
    place = locate_tokens(batch, k.shape[0])
    page = batch.page_table[place.row, place.position // size]
    half = (page[:, None] * kv_heads + jnp.arange(kv_heads))[..., None] * 2 + jnp.arange(2)
    index = half * size + (place.position % size)[:, None, None]
    index = jnp.where(place.valid[:, None, None], index, num_pages * kv_heads * 2 * size)  # dropped
    new = jnp.stack([to_stored(k, pages.dtype, k_scale), to_stored(v, pages.dtype, v_scale)], axis=2)
    flat = pages.reshape(-1, dim).at[index.reshape(-1)].set(new.reshape(-1, dim), mode="drop")
    return flat.reshape(pages.shape)


def _scales(k_scale: Array | None, v_scale: Array | None, kv_heads: int) -> Array | None:
    if k_scale is None and v_scale is None:
        return None
    one = jnp.ones(kv_heads, jnp.float32)
    both = (one if scale is None else scale.astype(jnp.float32) for scale in (k_scale, v_scale))
    return jnp.stack(list(both), axis=1)


def _sinks_of_rows(sinks: Array | None, plan: Plan, geometry: Geometry) -> Array | None:
    """For each kv head and row of a tile the sink of the row's head, in base 2."""
    if sinks is None:
        return None
    head = jnp.arange(ROWS * plan.groups) % geometry.group
    return sinks.astype(jnp.float32).reshape(geometry.kv_heads, -1)[:, head] * LOG2E


def require(problem: Problem) -> None:
    """Raises NotImplementedError, with the reason, for what the kernels do not serve."""
    require_values(problem)
    geometry = problem.geometry
    require_hopper(problem.platform, problem.device_kind)
    if problem.dtype != jnp.bfloat16:
        raise NotImplementedError(f"dtype={problem.dtype}: only bfloat16 queries are served")
    if geometry.dtype.name not in PAGE_DTYPES:
        raise NotImplementedError(f"pages of {geometry.dtype}: only {', '.join(PAGE_DTYPES)} are served")
    if geometry.page_size not in PAGE_SIZES:
        raise NotImplementedError(f"page_size={geometry.page_size}: only {PAGE_SIZES} are served")
    if geometry.head_dim > HEAD_DIM:
        raise NotImplementedError(f"head_dim={geometry.head_dim}: only up to {HEAD_DIM} are served")
    if swizzle_bytes(geometry.head_dim * geometry.dtype.itemsize) == 0:
        raise NotImplementedError(
            f"head_dim={geometry.head_dim} in {geometry.dtype}: must be a multiple of 32 bytes"
        )
    if problem.heads // geometry.kv_heads > ROWS:
        raise NotImplementedError(
            f"{problem.heads} heads over {geometry.kv_heads} kv heads: more than {ROWS} each"
        )


def _geometry(heads: int, pages: PageGeometry, dtype: jnp.dtype) -> Geometry:
    return Geometry(
        heads // pages.kv_heads, pages.kv_heads, pages.head_dim, pages.page_size, dtype, pages.dtype
    )


TUNABLE = Tunable(
    {"decode": gpu_plan.TUNABLE, "prefill": gpu_plan.TUNABLE},
    lambda problem: gpu_plan.tuning_key(_geometry(problem.heads, problem.geometry, problem.dtype)),
    lambda phase, blocks: partial(paged_attention_gpu, **{f"{phase}_blocks": blocks}),
)
BACKEND = Backend("gpu", paged_attention_gpu, layout=PageMajor(), require=require, tunable=TUNABLE)
