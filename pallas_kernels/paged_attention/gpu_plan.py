"""How the GPU kernel cuts its work, and what it needs of a thread block's shared memory."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.hopper import MULTIPROCESSORS, RESERVED, ROWS, SHARED_MEMORY, swizzle_bytes
from pallas_kernels.tuning import Blocks, lookup

OP = "paged_attention"
TUNABLE = {"block": (ROWS, 2 * ROWS), "stages": (1, 2, 3, 4)}
"""What `tuning.json` may choose: fields of `Plan`."""


def widened_columns(head_dim: int) -> int:
    """Columns of 8 bits that are widened at a time: 128 of them would not fit in registers."""
    return min(64, swizzle_bytes(head_dim))


@dataclass(frozen=True)
class Geometry:
    """Sizes that a kernel is compiled for; `group` is query heads for each kv head."""

    group: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: jnp.dtype
    page_dtype: jnp.dtype

    @property
    def widens(self) -> bool:
        """Whether pages have fewer bits than the queries."""
        return self.page_dtype.itemsize < self.dtype.itemsize


@dataclass(frozen=True)
class Score:
    """What becomes of a product of query and key."""

    scale: float
    sliding_window: int | None
    soft_cap: float | None


NARROW = 128
"""The most columns of results that a warpgroup has registers for: with 256, ptxas 12.9 spills up to 1.6 KB.

Divided over two warpgroups pages of bfloat16 and int8 spill nothing, those of float8 64 bytes in decode; soft
cap, window and sinks together, which no model has, up to 104.
"""


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        warpgroups: that compute: 1 or 2, each on 64 rows of a tile, or both on the same 64.
        tile_tokens: tokens of a tile.
        block: keys that are in work at a time: 64 or 128.
        stages: blocks in shared memory, as the tensor cores take them.
        raw_stages: blocks of 8 bits in shared memory, for pages of 8 bits.
        splits: thread blocks that share a tile's keys.
        blocks: thread blocks in all; each takes every `blocks`-th piece of work.
        parts: warpgroups that share 64 rows: each computes all scores, and its part of the results' columns.
    """

    warpgroups: int
    tile_tokens: int
    block: int
    stages: int
    raw_stages: int
    splits: int
    blocks: int
    parts: int = 1

    @property
    def groups(self) -> int:
        """Of 64 rows in a tile."""
        return self.warpgroups // self.parts

    def columns(self, geometry: Geometry) -> int:
        """Of the results, that a warpgroup computes."""
        return geometry.head_dim // self.parts

    def stored(self, geometry: Geometry) -> int:
        """Columns that a warpgroup stores at a time of its split's results."""
        return 32 if self.parts > 1 else geometry.head_dim

    def rows(self, geometry: Geometry) -> int:
        """Rows of a tile that are read and written: a multiple of 8, the copy engine's step."""
        if self.groups > 1:
            return ROWS * self.groups
        return -(-self.tile_tokens * geometry.group // 8) * 8

    def registers(self, geometry: Geometry) -> tuple[int, int] | None:
        """For each thread of the warpgroup that brings pages, and of those that compute.

        Three warpgroups start with 168 each, and may move them between themselves; two have enough.
        """
        if self.warpgroups == 1:
            return None
        if self.parts > 1:
            return (56, 224) if geometry.widens else (24, 240)
        return (72, 216) if geometry.widens else (40, 232)

    def shared_memory(self, geometry: Geometry) -> int:
        """Bytes of shared memory, without some hundred for barriers and reductions."""
        tile = self.groups * ROWS * geometry.head_dim
        keys = 2 * self.block * geometry.head_dim
        total = (tile + self.stages * keys) * geometry.dtype.itemsize
        if self.splits > 1:
            total += 4 * self.warpgroups * ROWS * (self.stored(geometry) + 1)
        if geometry.widens:
            total += self.raw_stages * keys * geometry.page_dtype.itemsize
        return total


def plan_singles(
    tiles: int, keys: int, geometry: Geometry, device_kind: str = "", blocks: Blocks | None = None
) -> Plan:
    """For rows of one token: each tile's keys divided so that every multiprocessor has work.

    Args:
        tiles: rows at most.
        keys: of a row at most.
        device_kind: whose tuned blocks to take; "": the computed default.
        blocks: in place of those.

    Raises:
        NotImplementedError: a block of keys does not fit into shared memory.
        ValueError: see `lookup`.
    """
    return _fit(1, 1, tiles, keys, geometry, blocks or _tuned("decode", geometry, device_kind))


def plan_ragged(
    tokens: int, keys: int, geometry: Geometry, device_kind: str = "", blocks: Blocks | None = None
) -> Plan:
    """For rows of several tokens: 128 query rows at a time, or 64 with divided keys where tokens are few.

    Of wide heads always 64.

    Args and errors are those of `plan_singles`.
    """
    tuned = blocks or _tuned("prefill", geometry, device_kind)
    groups = 2 if tokens > ROWS and geometry.head_dim <= NARROW else 1
    tile_tokens = ROWS * groups // geometry.group
    return _fit(groups, tile_tokens, -(-tokens // tile_tokens), keys, geometry, tuned)


def tuning_key(geometry: Geometry) -> dict[str, str | int]:
    """What decides which blocks are good, beside the phase."""
    return {
        "group": geometry.group,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "page_size": geometry.page_size,
        "pages": geometry.page_dtype.name,
    }


def _tuned(phase: str, geometry: Geometry, device_kind: str) -> Blocks:
    """The measured blocks, or the default: the most stages that fit, and 128 keys at a time where the results
    leave registers. Two warpgroups spill 32 bytes with 128 keys, cap, window and head_dim 64 (ptxas 12.9)."""
    wide = geometry.head_dim <= 64 and phase == "decode"
    default = {"block": 2 * ROWS if wide else ROWS, "stages": max(TUNABLE["stages"])}
    return lookup(OP, "gpu", device_kind, {"phase": phase, **tuning_key(geometry)}, TUNABLE) or default


def _fit(groups: int, tile_tokens: int, tiles: int, keys: int, geometry: Geometry, blocks: Blocks) -> Plan:
    """With as many of the stages as fit."""
    block, splits = blocks["block"], 1
    parts = 1 if geometry.head_dim <= NARROW else 2
    if groups == 1:
        splits = max(1, min(MULTIPROCESSORS // (tiles * geometry.kv_heads), -(-keys // block)))
    for stages in range(blocks["stages"], 0, -1):
        raw_stages = min(2, stages) if geometry.widens else 0
        for raw in range(raw_stages, min(raw_stages, 1) - 1, -1):
            plan = Plan(groups * parts, tile_tokens, block, stages, raw, splits, MULTIPROCESSORS, parts)
            if plan.shared_memory(geometry) <= SHARED_MEMORY - RESERVED:
                return plan
    raise NotImplementedError(f"{geometry}: a block of keys does not fit in {SHARED_MEMORY} bytes")
