"""The cases that every backend is held to, made once: fixed corners and anything hypothesis draws.

Pages that a row must not read are full of NaN, so a stray read shows in the output; what a step must leave
alone is compared bit by bit.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.batch import RaggedBatch


@dataclass(frozen=True)
class Case:
    """A step: each row is (new tokens, keys after the step), the rows of one token first."""

    rows: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 8
    padding_tokens: int = 3
    padding_rows: int = 2
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    shared_prefix_pages: int = 0
    """Full pages at the beginning of each row's context that all rows share."""
    seed: int = 0

    @property
    def scale(self) -> float:
        """The usual one."""
        return self.head_dim**-0.5


CORNERS = {
    "one decode row": Case(rows=((1, 13),)),
    "first token": Case(rows=((1, 1),)),
    "decode at a page's end": Case(rows=((1, 8), (1, 16), (1, 9))),
    "many decode rows": Case(rows=tuple((1, 1 + 3 * i) for i in range(11))),
    "one prefill": Case(rows=((21, 21),)),
    "prefill of a page": Case(rows=((8, 8),)),
    "a later chunk": Case(rows=((9, 40),)),
    "mixed": Case(rows=((1, 30), (1, 5), (2, 9), (17, 17), (5, 33))),
    "several tiles": Case(rows=((1, 300), (150, 150), (70, 400))),
    "no rows": Case(rows=()),
    "MQA": Case(rows=((1, 20), (6, 11)), kv_heads=1),
    "MHA": Case(rows=((1, 20), (6, 11)), kv_heads=4),
    "three heads a group": Case(rows=((1, 20), (6, 11)), heads=9, kv_heads=3),
    "head_dim 80": Case(rows=((1, 20), (6, 11)), head_dim=80),
    "head_dim 256": Case(rows=((1, 20), (6, 11)), head_dim=256),
    "window shorter than a page": Case(rows=((1, 30), (7, 25)), sliding_window=3),
    "window": Case(rows=((1, 300), (90, 310)), sliding_window=100),
    "window of one": Case(rows=((1, 30), (7, 25)), sliding_window=1),
    "soft cap": Case(rows=((1, 30), (7, 25)), soft_cap=2.0),
    "sinks": Case(rows=((1, 30), (7, 25)), sinks=True),
    "all at once": Case(rows=((1, 30), (1, 3), (7, 25)), sliding_window=5, soft_cap=3.0, sinks=True),
    "shared prefix": Case(rows=((1, 30), (1, 25), (7, 27)), shared_prefix_pages=2),
    "page of 128": Case(rows=((1, 200), (130, 130)), page_size=128),
    "page of one": Case(rows=((1, 7), (3, 5)), page_size=1),
}


@dataclass(frozen=True)
class Arrays:
    """A case's inputs and what must come out, in float64; pages are `[page, slot, 2 * kv_heads, dim]`."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pages: np.ndarray
    batch: RaggedBatch
    sinks: np.ndarray | None
    out: np.ndarray
    pages_after: np.ndarray


def build(case: Case) -> Arrays:
    """Draws the case's numbers and computes its result in float64, token by token."""
    rng = np.random.default_rng(case.seed)
    tokens = sum(n for n, _ in case.rows) + case.padding_tokens
    rows = len(case.rows) + case.padding_rows
    size = case.page_size
    columns = max([-(-kv // size) for _, kv in case.rows], default=1) + 1
    q = rng.normal(size=(tokens, case.heads, case.head_dim))
    k, v = rng.normal(size=(2, tokens, case.kv_heads, case.head_dim))
    sinks = rng.normal(size=case.heads) if case.sinks else None

    page_ids = iter(rng.permutation(np.arange(1, rows * columns + 2)))
    shared = [next(page_ids) for _ in range(case.shared_prefix_pages)]
    table = np.zeros((rows, columns), np.int32)
    pages = np.full((rows * columns + 2, size, 2 * case.kv_heads, case.head_dim), np.nan)
    prefix = rng.normal(size=(len(shared) * size, *pages.shape[2:]))
    out = np.zeros_like(q)
    pages_after = pages.copy()
    first = 0
    for row, (new, kv_len) in enumerate(case.rows):
        own = [next(page_ids) for _ in range(-(-kv_len // size) - len(shared))]
        table[row, : len(shared) + len(own)] = shared + own
        context = rng.normal(size=(kv_len, *pages.shape[2:]))
        context[: len(prefix)] = prefix
        old = kv_len - new
        lowest = 0 if case.sliding_window is None else max(0, old - case.sliding_window + 1)
        for position in range(lowest, old):
            pages[table[row, position // size], position % size] = context[position]
        context[old:, 0::2] = k[first : first + new]
        context[old:, 1::2] = v[first : first + new]
        for i in range(new):
            out[first + i] = _attend(case, q[first + i], context[: old + i + 1], sinks)
        first += new
    pages_after = _written(case, pages, table, k, v)
    counts = np.array([n for n, _ in case.rows] + [0] * case.padding_rows)
    batch = RaggedBatch(
        query_start=jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        kv_lens=jnp.asarray([kv for _, kv in case.rows] + [0] * case.padding_rows, jnp.int32),
        page_table=jnp.asarray(table),
        num_rows=jnp.asarray([sum(n == 1 for n, _ in case.rows), len(case.rows)], jnp.int32),
    )
    return Arrays(q, k, v, pages, batch, sinks, out, pages_after)


def _attend(case: Case, q: np.ndarray, context: np.ndarray, sinks: np.ndarray | None) -> np.ndarray:
    """One token's attention over its row's context, `[keys, 2 * kv_heads, dim]`."""
    if case.sliding_window is not None:
        context = context[-case.sliding_window :]
    group = case.heads // case.kv_heads
    keys, values = (np.repeat(context[:, half::2], group, axis=1) for half in (0, 1))
    scores = np.einsum("hd,chd->hc", q, keys) * case.scale
    if case.soft_cap is not None:
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    weights = np.exp(scores)
    total = weights.sum(axis=1) + (0.0 if sinks is None else np.exp(sinks))
    return np.einsum("hc,chd->hd", weights, values) / total[:, None]


def _written(case: Case, pages: np.ndarray, table: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The pages with the step's keys and values in their places."""
    pages, first = pages.copy(), 0
    for row, (new, kv_len) in enumerate(case.rows):
        for i, position in enumerate(range(kv_len - new, kv_len)):
            slot = pages[table[row, position // case.page_size], position % case.page_size]
            slot[0::2], slot[1::2] = k[first + i], v[first + i]
        first += new
    return pages
