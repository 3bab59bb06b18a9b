"""The cases that every backend is held to, made once: fixed corners and anything hypothesis draws.

Pages that a row must not read are full of NaN (of the largest number where the dtype has no NaN), so that a
stray read shows in the output, and so are the inputs of padding tokens. What a step must leave alone is
compared bit by bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pallas_kernels.paged_attention.batch import RaggedBatch
from pallas_kernels.paged_attention.scales import LARGEST

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Case:
    """A step: each row is (new tokens, keys after the step), the rows of one token first."""

    rows: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 8
    dtype: str = "float32"
    """Of queries, keys and values."""
    page_dtype: str | None = None
    """None: the same."""
    padding_tokens: int = 3
    padding_rows: int = 2
    spare_columns: int = 1
    """Columns of the page table that no row has use for."""
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    scales: bool = False
    """Whether the pages have scales; int8 pages need them."""
    shared_prefix_pages: int = 0
    """Full pages at the beginning of each row's context that all rows share."""
    value_dim: int | None = None
    """Pages hold keys of one head alone, whose first so many dimensions are the values; None: both."""
    seed: int = 0

    @property
    def scale(self) -> float:
        """The usual one."""
        return self.head_dim**-0.5

    @property
    def vectors(self) -> int:
        """That a page holds for a token and head."""
        return 2 if self.value_dim is None else 1

    @property
    def stored_dtype(self) -> np.dtype:
        """Of the pages."""
        return np.dtype(jnp.dtype(self.page_dtype or self.dtype))

    @property
    def tolerance(self) -> float:
        """Largest error allowed, relative to the largest magnitude of the expected output."""
        return 1e-5 if self.dtype == "float32" else 1e-2


MIXED = ((1, 30), (1, 5), (2, 9), (17, 17), (5, 33))

KEYS_AND_VALUES = {
    "one decode row": Case(rows=((1, 13),)),
    "first token": Case(rows=((1, 1),)),
    "decode at a page's end": Case(rows=((1, 8), (1, 16), (1, 9))),
    "many decode rows": Case(rows=tuple((1, 1 + 3 * i) for i in range(11))),
    "one prefill": Case(rows=((21, 21),)),
    "prefill of a page": Case(rows=((8, 8),)),
    "a later chunk": Case(rows=((9, 40),)),
    "mixed": Case(rows=MIXED),
    "drafts": Case(rows=((1, 30), (4, 33), (4, 4), (4, 16), (3, 17))),
    "several tiles": Case(rows=((1, 300), (150, 150), (70, 400))),
    "the table's width": Case(rows=((1, 48), (3, 48), (48, 48)), spare_columns=0),
    "no rows": Case(rows=()),
    "no padding": Case(rows=((1, 20), (6, 11)), padding_tokens=0, padding_rows=0),
    "MQA": Case(rows=((1, 20), (6, 11)), kv_heads=1),
    "MHA": Case(rows=((1, 20), (6, 11)), kv_heads=4),
    "three heads a group": Case(rows=((1, 20), (6, 11)), heads=9, kv_heads=3),
    "eight heads a group": Case(rows=((1, 20), (6, 11)), heads=16, kv_heads=2),
    "head_dim 80": Case(rows=((1, 20), (6, 11)), head_dim=80),
    "head_dim 96": Case(rows=((1, 20), (6, 11)), head_dim=96),
    "head_dim 128": Case(rows=((1, 20), (6, 11)), head_dim=128),
    "head_dim 256": Case(rows=((1, 20), (6, 11)), head_dim=256),
    "window shorter than a page": Case(rows=((1, 30), (7, 25)), sliding_window=3),
    "window": Case(rows=((1, 300), (90, 310)), sliding_window=100),
    "window of one": Case(rows=((1, 30), (7, 25)), sliding_window=1),
    "soft cap": Case(rows=((1, 30), (7, 25)), soft_cap=2.0),
    "sinks": Case(rows=((1, 30), (7, 25)), sinks=True),
    "all at once": Case(rows=((1, 30), (1, 3), (7, 25)), sliding_window=5, soft_cap=3.0, sinks=True),
    "shared prefix": Case(rows=((1, 30), (1, 25), (7, 27)), shared_prefix_pages=2),
    "page of 16": Case(rows=((1, 50), (20, 33)), page_size=16),
    "page of 32": Case(rows=((1, 70), (40, 64)), page_size=32),
    "page of 128": Case(rows=((1, 200), (130, 130)), page_size=128),
    "page of one": Case(rows=((1, 7), (3, 5)), page_size=1),
    "bfloat16": Case(rows=MIXED, dtype="bfloat16"),
    "bfloat16, several tiles": Case(rows=((1, 300), (150, 150), (70, 400)), page_size=16, dtype="bfloat16"),
    "bfloat16, head_dim 128": Case(rows=MIXED, heads=8, head_dim=128, page_size=16, dtype="bfloat16"),
    "bfloat16, all at once": Case(
        rows=MIXED, head_dim=128, page_size=16, sliding_window=6, soft_cap=3.0, sinks=True, dtype="bfloat16"
    ),
    "int8": Case(rows=MIXED, page_size=32, dtype="bfloat16", page_dtype="int8", scales=True),
    "int8, float32": Case(rows=MIXED, page_dtype="int8", scales=True),
    "int8, several tiles": Case(
        rows=((1, 300), (150, 150), (70, 400)), head_dim=128, page_size=32, dtype="bfloat16",
        page_dtype="int8", scales=True,
    ),
    "float8": Case(rows=MIXED, page_size=32, dtype="bfloat16", page_dtype="float8_e4m3fn"),
    "float8 with scales": Case(
        rows=MIXED, head_dim=128, page_size=32, dtype="bfloat16", page_dtype="float8_e4m3fn", scales=True
    ),
    "float8, float32": Case(rows=MIXED, page_dtype="float8_e4m3fn", scales=True),
    "bfloat16 pages, float32": Case(rows=MIXED, page_dtype="bfloat16"),
}  # fmt: skip

SHARED = {
    "keys alone": Case(rows=MIXED, heads=3, kv_heads=1, head_dim=24, value_dim=16),
    "keys alone, shared prefix": Case(
        rows=((1, 30), (1, 25), (7, 27)), kv_heads=1, head_dim=24, value_dim=16, shared_prefix_pages=2
    ),
    "keys alone, bfloat16, several tiles": Case(
        rows=((1, 300), (150, 150), (70, 400)), kv_heads=1, head_dim=80, page_size=16, dtype="bfloat16",
        value_dim=64,
    ),
}  # fmt: skip
"""Multi-head latent attention, which kernels of keys and values refuse."""
CORNERS = KEYS_AND_VALUES | SHARED


def strategy(
    dtypes: tuple[tuple[str, str | None], ...] = (("float32", None),),
    head_dims: tuple[int, ...] = (64,),
    page_sizes: tuple[int, ...] = (8,),
) -> "SearchStrategy[Case]":
    """Hypothesis' strategy for cases.

    Args:
        dtypes: pairs of `Case.dtype` and `Case.page_dtype`.
    """
    from hypothesis import strategies as st  # a dependency of the tests, not of the library

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        page_size = draw(st.sampled_from(page_sizes))
        prefix_pages = draw(st.integers(0, 2))
        shared = prefix_pages * page_size
        decode = draw(st.lists(st.integers(shared + 1, shared + 44), max_size=4))
        chunks = draw(st.lists(st.tuples(st.integers(2, 20), st.integers(shared, shared + 24)), max_size=3))
        kv_heads = draw(st.sampled_from([1, 2]))
        dtype, page_dtype = draw(st.sampled_from(dtypes))
        return Case(
            rows=(*((1, kv) for kv in decode), *((new, new + old) for new, old in chunks)),
            heads=kv_heads * draw(st.sampled_from([1, 3])),
            kv_heads=kv_heads,
            head_dim=draw(st.sampled_from(head_dims)),
            page_size=page_size,
            dtype=dtype,
            page_dtype=page_dtype,
            padding_tokens=draw(st.integers(0, 4)),
            padding_rows=draw(st.integers(0, 3)),
            spare_columns=draw(st.integers(0, 2)),
            sliding_window=draw(st.none() | st.integers(1, 40)),
            soft_cap=draw(st.none() | st.just(1.5)),
            sinks=draw(st.booleans()),
            scales=page_dtype == "int8" or (page_dtype == "float8_e4m3fn" and draw(st.booleans())),
            shared_prefix_pages=prefix_pages,
            seed=draw(st.integers(0, 99)),
        )

    return draw_case()


Definition = Callable[
    [
        Case,
        Float[np.ndarray, "heads dim"],
        Float[np.ndarray, "keys kv_heads dim"],
        Float[np.ndarray, "keys kv_heads dim"],
        "Float[np.ndarray, ' heads'] | None",
    ],
    Float[np.ndarray, "heads dim"],
]
"""One token's attention over the keys and values up to its own, in float64: case, q, keys, values, sinks."""


@dataclass(frozen=True)
class Arrays:
    """A case's inputs in its dtypes, and what must come out, in float64.

    Pages are packed as `INTERLEAVED`: `[page, slot, vectors * kv_heads, dim]`.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pages: np.ndarray
    batch: RaggedBatch
    sinks: np.ndarray | None
    k_scale: np.ndarray | None
    v_scale: np.ndarray | None
    out: np.ndarray
    pages_after: np.ndarray


def attend(
    case: Case, q: np.ndarray, keys: np.ndarray, values: np.ndarray, sinks: np.ndarray | None
) -> np.ndarray:
    """The op's definition for one token; see `Definition`."""
    if case.sliding_window is not None:
        keys, values = keys[-case.sliding_window :], values[-case.sliding_window :]
    keys, values = (np.repeat(x, case.heads // case.kv_heads, axis=1) for x in (keys, values))
    scores = np.einsum("hd,chd->hc", q, keys) * case.scale
    if case.soft_cap is not None:
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    weights = np.exp(scores)
    total = weights.sum(axis=1) + (0.0 if sinks is None else np.exp(sinks))
    return np.einsum("hc,chd->hd", weights, values) / total[:, None]


def build(case: Case, definition: Definition = attend) -> Arrays:
    """Draws the case's numbers and computes its result in float64, token by token."""
    rng = np.random.default_rng(case.seed)
    tokens = sum(new for new, _ in case.rows)
    shape = (max(1, tokens + case.padding_tokens), case.kv_heads, case.head_dim)
    q = rng.normal(size=(shape[0], case.heads, case.head_dim))
    k, v = rng.normal(size=(2, *shape))
    if case.value_dim is not None:
        v = k[..., : case.value_dim]
    for x in (q, k, v):
        x[tokens:] = np.nan
    q, k, v = (x.astype(jnp.dtype(case.dtype)) for x in (q, k, v))
    sinks = rng.normal(size=case.heads).astype(np.float32) if case.sinks else None
    # 4 standard deviations of what is stored just fit, so that some values are clipped
    largest = LARGEST.get(jnp.dtype(case.stored_dtype), 1.0)
    low = 4.0 / largest if case.page_dtype == "int8" else 0.5
    scales = rng.uniform(low, 1.5 * low, size=(2, case.kv_heads)).astype(np.float32) if case.scales else None

    table = _draw_table(case, rng)
    pages, pages_after = _fill_pages(case, rng, table, _stored(case, k, v, scales))
    out, first = np.zeros((*q.shape[:2], v.shape[2])), 0
    for row, (new, kv_len) in enumerate(case.rows):
        context = pages_after[table[row]].reshape(-1, case.kv_heads, case.vectors, case.head_dim)
        context = context.astype(np.float64)
        if scales is not None:
            context *= scales.T[:, :, None]
        for i in range(new):
            seen = context[: kv_len - new + i + 1]
            token = q[first + i].astype(np.float64)
            out[first + i] = definition(case, token, seen[:, :, 0], seen[:, :, -1, : v.shape[2]], sinks)
        first += new
    k_scale, v_scale = (None, None) if scales is None else scales
    return Arrays(q, k, v, pages, _make_batch(case, table), sinks, k_scale, v_scale, out, pages_after)


def _draw_table(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Random pages for each row, after those that all share; 0, the null page, where a row needs none."""
    needed = [-(-kv_len // case.page_size) for _, kv_len in case.rows]
    columns = max(needed, default=1) + case.spare_columns
    table = np.zeros((max(1, len(case.rows) + case.padding_rows), columns), np.int32)
    ids = rng.permutation(np.arange(1, _num_pages(case)))
    shared, own = np.split(ids, [case.shared_prefix_pages])
    for row, count in enumerate(needed):
        table[row, :count] = np.concatenate([shared, own])[:count]
        own = own[max(0, count - len(shared)) :]
    return table


def _num_pages(case: Case) -> int:
    """The null page, all that the rows need, and one that nobody has."""
    return 2 + case.shared_prefix_pages + sum(-(-kv_len // case.page_size) for _, kv_len in case.rows)


def _fill_pages(
    case: Case, rng: np.random.Generator, table: np.ndarray, new: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pages before and after: old keys and values that some token may see, and poison elsewhere."""
    dtype = case.stored_dtype
    shape = (_num_pages(case), case.page_size, case.vectors * case.kv_heads, case.head_dim)
    pages = np.full(shape, 127 if dtype == np.int8 else np.nan).astype(dtype)
    spread = 30.0 if dtype == np.int8 else 1.0
    drawn = (spread * rng.normal(size=shape)).astype(dtype)
    for row, (count, kv_len) in enumerate(case.rows):
        old = kv_len - count
        lowest = 0 if case.sliding_window is None else max(0, old - case.sliding_window + 1)
        for position in range(lowest, old):
            place = table[row, position // case.page_size], position % case.page_size
            pages[place] = drawn[place]
    after, first = pages.copy(), 0
    for row, (count, kv_len) in enumerate(case.rows):
        for i, position in enumerate(range(kv_len - count, kv_len)):
            after[table[row, position // case.page_size], position % case.page_size] = new[first + i]
        first += count
    return pages, after


def _stored(case: Case, k: np.ndarray, v: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """New keys and values as the pages are to hold them, `[tokens, vectors * kv_heads, dim]`."""
    new = np.stack([k, v] if case.value_dim is None else [k], axis=2)
    largest = LARGEST.get(jnp.dtype(case.stored_dtype))
    if largest is not None:
        new = new.astype(np.float32)
        new = np.clip(new if scales is None else new / scales.T[:, :, None], -largest, largest)
        new = np.nan_to_num(np.round(new) if case.page_dtype == "int8" else new)
    return new.astype(case.stored_dtype).reshape(len(k), case.vectors * case.kv_heads, case.head_dim)


def _make_batch(case: Case, table: np.ndarray) -> RaggedBatch:
    counts = np.zeros(len(table), np.int32)
    kv_lens = np.zeros(len(table), np.int32)
    if case.rows:
        counts[: len(case.rows)], kv_lens[: len(case.rows)] = np.array(case.rows).T
    return RaggedBatch(
        query_start=jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        kv_lens=jnp.asarray(kv_lens),
        page_table=jnp.asarray(table),
        num_rows=jnp.asarray([sum(new == 1 for new, _ in case.rows), len(case.rows)], jnp.int32),
    )
