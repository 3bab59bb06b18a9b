"""What of paged attention is timed: decode steps and chunks of prefill, over pools of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.bench import Options, Prepared, Workload
from pallas_kernels.models import ModelShape, get_model
from pallas_kernels.paged_attention.batch import RaggedBatch
from pallas_kernels.paged_attention.layout import PageGeometry, PageLayout
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.paged_attention.work import attention_bytes, attention_flops

DEFAULTS = {
    "cpu": Options("smollm2-135m", (1, 32), (256, 2048, 8192), (512,), 16),
    "gpu": Options("llama-3-8b", (1, 32, 128, 256), (1024, 8192, 32768), (512, 2048, 8192), 64),
    "tpu": Options("llama-3-8b", (1, 32, 128, 256), (1024, 8192, 32768), (512, 2048, 8192), 128),
}
TEMPLATE_BYTES = 32 * 2**20
"""Of the pages that are drawn at random and repeated until a pool is full."""


@dataclass(frozen=True)
class Step:
    """Rows that all have so many new tokens and so many keys."""

    model: ModelShape
    problem: Problem
    rows: int
    tokens: int
    context: int

    @property
    def geometry(self) -> PageGeometry:
        """Of a pool with pages for all rows, and the null page."""
        return self.problem.geometry.with_pages(1 + self.rows * self.columns)

    @property
    def columns(self) -> int:
        """Pages of a row."""
        return -(-self.context // self.problem.geometry.page_size)

    @property
    def flops(self) -> float:
        """Of both products of all rows, for the keys that are seen and no others."""
        return attention_flops(self.problem, self.rows, self.tokens, self.context)

    @property
    def nbytes(self) -> float:
        """Keys and values that are seen, read once; those that are new, written; queries and outputs."""
        return attention_bytes(self.problem, self.rows, self.tokens, self.context)

    def prepare(self, backend: Any, function: Callable[..., Any], copies: int) -> Prepared:
        """A program of `copies` layers with pages of their own; a layer's output is the next one's query."""
        keys = iter(jax.random.split(jax.random.key(0), 3 + copies))
        geometry, dtype, total = self.problem.geometry, self.problem.dtype, self.rows * self.tokens
        q, k, v = (
            jax.random.normal(next(keys), (total, heads, geometry.head_dim), dtype)
            for heads in (self.problem.heads, geometry.kv_heads, geometry.kv_heads)
        )
        pools = [make_pool(backend.layout, self.geometry, next(keys)) for _ in range(copies)]
        attend = partial(
            function,
            scale=geometry.head_dim**-0.5,
            sliding_window=self.problem.sliding_window,
            soft_cap=None,
            sinks=None,
        )

        @partial(jax.jit, donate_argnums=1)
        def run(inputs: tuple[Any, ...], carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
            k, v, batch, scale = inputs  # as constants XLA would compute with them ahead of time
            q, pools = carry
            for i, pages in enumerate(pools):
                q, pools[i] = attend(q, k, v, pages, batch, k_scale=scale, v_scale=scale)
            return q, pools

        return Prepared(partial(run, (k, v, self.batch(), self._scale())), (q, pools))

    def batch(self) -> RaggedBatch:
        """With pages in random order, as they are after some hours of serving."""
        ids = 1 + np.random.default_rng(0).permutation(self.rows * self.columns)
        return RaggedBatch(
            query_start=jnp.arange(self.rows + 1, dtype=jnp.int32) * self.tokens,
            kv_lens=jnp.full(self.rows, self.context, jnp.int32),
            page_table=jnp.asarray(ids.reshape(self.rows, self.columns), jnp.int32),
            num_rows=jnp.asarray([self.rows if self.tokens == 1 else 0, self.rows], jnp.int32),
        )

    def _scale(self) -> Array | None:
        kv_heads, dtype = self.problem.geometry.kv_heads, self.problem.geometry.dtype
        return jnp.full(kv_heads, 0.05, jnp.float32) if dtype == jnp.int8 else None


def workloads(platform: str, device_kind: str, options: Options) -> list[Workload]:
    """Decode for each number of rows and context, prefill of one row for each chunk and context."""
    default = DEFAULTS[platform]
    model = get_model(options.model or default.model or "")
    problem = make_problem(model, platform, device_kind, options, default)
    context = options.context or default.context
    steps = {
        f"decode {rows} x {keys}": ("decode", Step(model, problem, rows, 1, keys))
        for rows in options.rows or default.rows
        for keys in context
    }
    for chunk in options.chunk or default.chunk:
        for keys in sorted({max(chunk, keys) for keys in context}):
            steps[f"prefill {chunk} to {keys}"] = ("prefill", Step(model, problem, 1, chunk, keys))
    return [
        Workload(
            "paged_attention", name, phase, problem, step.flops, step.nbytes, pool_bytes(step), step.prepare
        )
        for name, (phase, step) in steps.items()
    ]


def make_problem(
    model: ModelShape, platform: str, device_kind: str, options: Options, default: Options
) -> Problem:
    """A layer of the model in bfloat16."""
    dtype = jnp.dtype(jnp.bfloat16)
    geometry = PageGeometry(
        0,
        options.page_size or default.page_size or 16,
        model.kv_heads,
        model.head_dim,
        jnp.dtype(options.page_dtype or dtype),
    )
    return Problem(platform, device_kind, model.heads, geometry, dtype, model.sliding_window)


def pool_bytes(step: Step) -> int:
    """Of one layer's pages."""
    return step.geometry.num_pages * step.geometry.bytes_per_page


def make_pool(layout: PageLayout, geometry: PageGeometry, key: Array) -> Array:
    """A pool of random numbers in a backend's packing, made of some pages again and again.

    Numbers for all pages at once, before they are packed, would take several times the pool.
    """
    few = min(geometry.num_pages, max(1, TEMPLATE_BYTES // geometry.bytes_per_page))
    shape = geometry.with_pages(few).logical_shape
    numbers = jax.random.normal(key, shape, jnp.float32) * (30.0 if geometry.dtype == jnp.int8 else 1.0)
    template = layout.pack(numbers.astype(geometry.dtype))
    shape = layout.array(geometry).shape
    for axis, (have, want) in enumerate(zip(template.shape, shape, strict=True)):
        if have != want:
            return _repeat(template, axis, want)
    return jnp.array(template)


@partial(jax.jit, static_argnums=(1, 2))
def _repeat(array: Array, axis: int, size: int) -> Array:
    """The array again and again along the axis, until it has that size."""
    return jax.lax.slice_in_dim(
        jnp.concatenate([array] * -(-size // array.shape[axis]), axis), 0, size, axis=axis
    )
