"""Self-attention over paged keys and values."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from jaxllm.layers.batch import Batch, Cache
from jaxllm.layers.linear import Linear
from jaxllm.layers.norm import NormOptions, RMSNorm
from jaxllm.layers.parameter import parameter, zeros
from jaxllm.layers.rope import Rotation, rotate
from jaxllm.parallel import partition_spec, share_over
from pallas_kernels.paged_attention import Backend, PageLayout, RaggedBatch, paged_attention

HeadNorm = Literal["each", "all"]
"""Queries and keys are normalized head by head, or all heads of a token at once."""


@dataclass(frozen=True)
class AttentionOptions:
    """What sets one family's attention apart from another's.

    Attributes:
        scale: multiplies the scores.
        soft_cap: bounds the scores: `soft_cap * tanh(score / soft_cap)`.
        qkv_bias, output_bias: whether the products have biases.
        head_norm: how queries and keys are normalized before they are rotated, if at all.
        sinks: each head has a score that takes part in its softmax and has no value (gpt-oss).
    """

    scale: float
    soft_cap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    head_norm: HeadNorm | None = None
    sinks: bool = False


class Attention(nnx.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245), causal within each row of the batch.

    The fused weight `[embed, kv_heads, group + 2, head_dim]` holds for each key-value head the query heads
    that read it, then its key, then its value: cut along `kv_heads`, each device has what belongs together.

    Args:
        embed, heads, kv_heads, head_dim: sizes; `kv_heads` after repetition for tensor parallelism.
        layer: which of the batch's slots the keys and values go to.
        window: a token sees this many positions up to its own; None: all.
        norm: of queries and keys, where `options.head_norm` asks for them.
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        layer: int,
        window: int | None,
        options: AttentionOptions,
        norm: NormOptions,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        group = heads // kv_heads
        axes = ("embed", "kv_heads", None, None)
        outputs = (kv_heads, group + 2, head_dim)
        self.qkv = Linear((embed,), outputs, axes, bias=options.qkv_bias, dtype=dtype, rngs=rngs)
        axes = ("heads", None, "embed")
        inputs = (heads, head_dim)
        self.output = Linear(inputs, (embed,), axes, bias=options.output_bias, dtype=dtype, rngs=rngs)

        def make_norm(count: int, axis: str) -> RMSNorm | None:
            if options.head_norm is None:
                return None
            shape, axes = ((head_dim,), (None,))
            if options.head_norm == "all":
                shape, axes = ((count, head_dim), (axis, None))
            return RMSNorm(shape, axes, norm, dtype=dtype, rngs=rngs)

        self.query_norm = make_norm(heads, "heads")
        self.key_norm = make_norm(kv_heads, "kv_heads")
        self.sinks = parameter((heads,), ("heads",), dtype, rngs, zeros) if options.sinks else None
        self.layer = layer
        self.window = window
        self.options = options

    def __call__(
        self,
        x: Float[Array, "tokens embed"],
        cache: Cache,
        batch: Batch,
        rotation: Rotation | None,
        *,
        norm: RMSNorm | None = None,
        residual: Float[Array, "tokens embed"] | None = None,
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        """Attends, and returns the cache with this step's keys and values in it.

        Args:
            rotation: of the tokens' positions; None where the layer has no rotary embedding.
            norm, residual: as `Linear` takes them.
        """
        qkv = self.qkv(x, norm=norm)
        tokens, _, _, head_dim = qkv.shape
        q, k, v = qkv[:, :, :-2].reshape(tokens, -1, head_dim), qkv[:, :, -2], qkv[:, :, -1]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out, cache = self._attend(q, k, v, cache, batch)
        return self.output(out, residual=residual), cache

    def _attend(self, q: Array, k: Array, v: Array, cache: Cache, batch: Batch) -> tuple[Array, Cache]:
        """Each device attends with its own heads over its own part of the pages."""
        group, pool = batch.slot(self.layer)
        mesh = jax.sharding.get_abstract_mesh()
        attend = sharded_attention(
            mesh, self.options.scale, self.window, self.options.soft_cap, batch.backend
        )
        sinks = None if self.sinks is None else self.sinks[...]
        out, pages = attend(q, k, v, cache[pool], batch.groups[group], sinks)
        return out, (*cache[:pool], pages, *cache[pool + 1 :])


@functools.cache
def sharded_attention(
    mesh: AbstractMesh, scale: float, window: int | None, soft_cap: float | None, backend: Backend
) -> Callable[..., tuple[Array, Array]]:
    """The op over the mesh. Layers that are alike share one function, so that it is traced once for all."""
    heads = partition_spec((None, "heads", None))
    pages = pages_spec(backend.layout)

    def attend(q: Array, k: Array, v: Array, pool: Array, rows: RaggedBatch, sinks: Array | None) -> object:
        options = {"scale": scale, "sliding_window": window, "soft_cap": soft_cap, "sinks": sinks}
        return paged_attention(q, k, v, pool, rows, **options, backend=backend)

    return share_over(
        mesh,
        attend,
        in_specs=(heads, heads, heads, pages, PartitionSpec(), partition_spec(("heads",))),
        out_specs=(heads, pages),
        check_vma=False,  # kernels say nothing about how their results vary over the mesh
    )


def pages_spec(layout: PageLayout) -> PartitionSpec:
    """How pools of pages in a packing are cut: along their heads."""
    return partition_spec((None,) * layout.heads_axis + ("kv_heads",))
