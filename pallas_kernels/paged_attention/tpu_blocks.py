"""How much the TPU kernels do at once: a safe default for any shape, and the memory that it takes."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from pallas_kernels.paged_attention.tpu_layout import LANES, Lanes
from pallas_kernels.paged_attention.tpu_plan import Blocks, Plan
from pallas_kernels.tuning import lookup

OP = "paged_attention"
TUNABLE = {
    "decode": {"pages": (1, 2, 4, 8, 16, 32, 64), "keys": (128, 256, 512), "slots": (2, 3, 4)},
    "prefill": {
        "queries": (16, 32, 64, 128, 256),
        "pages": (1, 2, 4, 8, 16, 32, 64),
        "keys": (256, 512, 1024),
        "slots": (2, 3),
    },
}
"""What `tuning.json` may choose for each phase: fields of `Blocks`."""

MIB = 2**20
VMEM = {"TPU v5": 64 * MIB, "TPU v5p": 64 * MIB, "TPU v5 lite": 128 * MIB, "TPU v6 lite": 128 * MIB}
"""Bytes of a core's vector memory by device kind."""
SMALL_VMEM = 16 * MIB
"""That of the older chips, and what is taken for one that is not known."""
SMEM = MIB
"""Bytes of a core's scalar memory, the same on all chips since v4."""
SMEM_RESERVED = 32 * 1024
"""What of it the compiler and the lengths of rows may need."""

DECODE_BYTES = 2 * MIB
"""Bytes of pages copied at once for rows of one token: what v5e's memory delivers in 2.5 us and v6e's in 1.3,
so that two such blocks under way cover the latency of about 1 us."""
WRITE_SLOTS = 4
"""Pages that the kernel that writes has at hand: being read, packed and written."""
MATRIX_ROWS = 512
"""Rows of a product in prefill: more do not make better use of a matrix unit of 128 or 256 rows."""
MIXED_QUERIES = 16
"""Tokens of a tile where rows have few: drafts, the ends of prompts."""
PREFILL_TOKENS_PER_ROW = 32
"""From so many tokens for each row of the bucket on, tiles are those of prefill."""


UNSET = Blocks(1, 1, 1)


def make_plan(
    *,
    decode: bool,
    heads: int,
    kv_heads: int,
    lanes: Lanes,
    page_size: int,
    columns: int,
    dtype: jnp.dtype,
    queries: jnp.dtype,
    sliding_window: int | None,
    soft_cap: float | None,
    tokens: int,
    rows: int,
    device_kind: str,
    blocks: Blocks | None,
) -> Plan:
    """The plan of a call: with the blocks given, or else those measured for the chip, or the default.

    Raises:
        ValueError: see `lookup`.
        NotImplementedError: the kernels' buffers do not fit into the chip's vector memory.
    """
    exact = jnp.dtype(jnp.float32) in (dtype, queries)
    product = jnp.dtype(jnp.float32 if exact else jnp.bfloat16)
    plan = Plan(
        decode, heads, kv_heads, lanes, page_size, columns, dtype, product, sliding_window, soft_cap, UNSET
    )
    if blocks is None:
        bucket = (tokens, rows, device_kind)
        blocks = tuned_blocks(plan, *bucket) or default_blocks(plan, *bucket)
    plan = dataclasses.replace(plan, blocks=fit_keys(plan, blocks))
    if max(vmem_bytes(plan), write_bytes(plan)) > budget_of(device_kind):
        raise NotImplementedError(
            f"page_size={page_size} with {kv_heads} kv heads of {lanes.head_dim}: too much for "
            f"{budget_of(device_kind):,} bytes of VMEM; take smaller pages"
        )
    return plan


def tuning_key(
    heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: jnp.dtype
) -> dict[str, str | int]:
    """What decides which blocks are good, beside the phase; `dtype` is that of the pages."""
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "pages": dtype.name,
    }


def tuned_blocks(plan: Plan, tokens: int, rows: int, device_kind: str) -> Blocks | None:
    """Those measured on this chip, no larger than the bucket has use for; None: there are none.

    Args and errors are those of `default_blocks` and of `lookup`.
    """
    if not plan.decode and not _is_prefill(tokens, rows):
        return None
    phase = "decode" if plan.decode else "prefill"
    key = tuning_key(plan.heads, plan.kv_heads, plan.lanes.head_dim, plan.page_size, plan.dtype)
    found = lookup(OP, "tpu", device_kind, {"phase": phase, **key}, TUNABLE[phase])
    if found is None:
        return None
    blocks = as_blocks(found)
    queries = 1 if plan.decode else max(8, min(blocks.queries, _power(2 * tokens - 1)))
    blocks = dataclasses.replace(blocks, queries=queries, pages=min(blocks.pages, _most_pages(plan)))
    return fit_memory(plan, blocks, device_kind)


def as_blocks(numbers: Mapping[str, int]) -> Blocks:
    """From what `TUNABLE` names."""
    return Blocks(**{"queries": 1, **numbers})


def _is_prefill(tokens: int, rows: int) -> bool:
    return tokens >= PREFILL_TOKENS_PER_ROW * rows


def _most_pages(plan: Plan) -> int:
    """A power of two that holds the longest row."""
    return 1 << (max(plan.columns, 1) - 1).bit_length()


def default_blocks(plan: Plan, tokens: int, rows: int, device_kind: str) -> Blocks:
    """Blocks that fit into the kernels' part of the chip's vector memory, if any do.

    Args:
        plan: its own `blocks` are not looked at.
        tokens, rows: of the bucket.
    """
    most = _most_pages(plan)
    row_bytes = plan.kv_heads * plan.page_size * plan.lanes.row * plan.dtype.itemsize
    if plan.decode:
        keys = 256
        pages = _power(DECODE_BYTES // row_bytes)
        blocks = Blocks(queries=1, pages=max(1, min(pages, most)), keys=keys, slots=3)
    else:
        queries = _power(MATRIX_ROWS // plan.group) if _is_prefill(tokens, rows) else MIXED_QUERIES
        queries = max(8, min(queries, _power(2 * tokens - 1)))
        blocks = Blocks(queries, pages=max(1, min(_power(1024 // plan.page_size), most)), keys=512)
    return fit_memory(plan, blocks, device_kind)


def fit_memory(plan: Plan, blocks: Blocks, device_kind: str) -> Blocks:
    """The same, made smaller until they fit into the kernels' part of vector memory, if any do."""
    blocks = fit_keys(plan, blocks)
    while vmem_bytes(dataclasses.replace(plan, blocks=blocks)) > budget_of(device_kind):
        smaller = fit_keys(plan, _smaller(blocks))
        if smaller == blocks:
            break
        blocks = smaller
    return blocks


def fit_keys(plan: Plan, blocks: Blocks) -> Blocks:
    """The same with no more keys in a product than there are in a block."""
    return dataclasses.replace(blocks, keys=min(blocks.keys, blocks.pages * plan.page_size))


def _smaller(blocks: Blocks) -> Blocks:
    """Half of whatever is cheapest to halve; the same, where nothing is left."""
    if blocks.pages > 1:
        return dataclasses.replace(blocks, pages=blocks.pages // 2)
    if blocks.queries > 8:
        return dataclasses.replace(blocks, queries=blocks.queries // 2)
    return dataclasses.replace(blocks, slots=2)


def budget_of(device_kind: str) -> int:
    """Bytes that the kernels' buffers may take: half of a core's vector memory."""
    return VMEM.get(device_kind, SMALL_VMEM) // 2


def vmem_limit(size: int, device_kind: str) -> int:
    """What the compiler may use where buffers take `size` bytes: as much again for its own values."""
    return min(2 * size + 8 * MIB, VMEM.get(device_kind, SMALL_VMEM))


def vmem_bytes(plan: Plan) -> int:
    """Bytes of the attention kernel's buffers, and of the values of one product."""
    blocks, operand = plan.blocks, plan.lanes.operand
    row_bytes = plan.lanes.row * plan.dtype.itemsize
    pages = blocks.slots * plan.kv_heads * plan.keys_in_block * row_bytes
    tokens = (blocks.slots + 2) * blocks.queries * plan.query_rows * LANES * 4
    matrices = (
        plan.kv_heads * plan.matrix_rows * (operand * plan.product.itemsize + (2 * LANES + operand) * 4)
    )
    new = plan.decode * (
        blocks.slots * plan.new_rows * LANES * 4 + 2 * plan.kv_heads * plan.tile_rows * row_bytes
    )
    product = 3 * plan.matrix_rows * blocks.keys * 4 + 2 * blocks.keys * operand * 4
    return pages + tokens + matrices + new + product


def write_bytes(plan: Plan) -> int:
    """Bytes of the buffers of the kernel that writes pages."""
    page = plan.kv_heads * plan.lanes.row * plan.dtype.itemsize
    return WRITE_SLOTS * plan.page_size * (plan.new_rows * LANES * 4 + page)


def check_smem(rows: int, columns: int) -> None:
    """Whether a page table fits into scalar memory.

    Raises:
        ValueError: it does not; the message says which settings make it smaller.
    """
    size = 4 * rows * columns
    if size > SMEM - SMEM_RESERVED:
        raise ValueError(
            f"the page table of {rows} rows by {columns} pages takes {size:,} bytes, and a TPU core has "
            f"{SMEM - SMEM_RESERVED:,} for it; lower max_num_seqs or max_model_len, or raise page_size"
        )


def _power(x: int) -> int:
    """The largest power of two up to `x`, at least 1."""
    return 1 << (max(x, 1).bit_length() - 1)
