"""Multi-head latent attention (https://arxiv.org/abs/2405.04434, section 2.1)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from jaxllm.layers.attention import pages_spec
from jaxllm.layers.batch import Batch, Cache
from jaxllm.layers.linear import Linear
from jaxllm.layers.norm import NormOptions, RMSNorm
from jaxllm.layers.parameter import parameter
from jaxllm.layers.rope import Rotation, rotate
from jaxllm.parallel import Axes, partition_spec, share_over
from pallas_kernels.paged_attention import Backend, RaggedBatch, paged_attention


@dataclass(frozen=True)
class LatentSizes:
    """Dimensions of latent attention.

    Attributes:
        latent: of what keys and values of a token are made of.
        query_latent: of what queries are made of; None: they are made of the hidden state.
        plain, rotated: of a head's query and key, without and with positions.
        value: of a head's value.
    """

    latent: int
    query_latent: int | None
    plain: int
    rotated: int
    value: int

    @property
    def cached(self) -> int:
        """Numbers kept for a token: its latent, and the rotated part of the key that all heads share."""
        return self.latent + self.rotated


class HeadLinear(nnx.Module):
    """A product for each head, with weights `[heads, inputs, outputs]`."""

    def __init__(self, heads: int, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.weight = parameter((heads, inputs, outputs), ("heads", None, None), dtype, rngs)

    def __call__(self, x: Float[Array, "tokens heads inputs"]) -> Float[Array, "tokens heads outputs"]:
        weight = self.weight[...]
        y = jax.lax.platform_dependent(x, weight, cpu=_each_in_float32, default=_each)
        return y.astype(x.dtype)


def _each(x: Array, weight: Array) -> Array:
    return jnp.einsum("thi,hio->tho", x, weight, preferred_element_type=jnp.float32)


def _each_in_float32(x: Array, weight: Array) -> Array:
    """XLA on CPU has no products of bfloat16 with a float32 result for many matrices at a time."""
    return _each(x.astype(jnp.float32), weight.astype(jnp.float32))


class LatentAttention(nnx.Module):
    """Attention whose keys and values are made of one short vector for each token, which is all that is kept.

    What makes keys of latents is moved to the queries, and what makes values of them behind the attention:
    the scores are the same, and no token's keys and values are ever made. In DeepSeek-V3 a token takes 576
    numbers a layer, where keys and values of its 128 heads would be 40,960, and all heads read the same ones.
    To make these of every token in the context again at each step would cost more than the longer products.

    Args:
        embed, heads: sizes.
        layer: which of the batch's slots the latents go to.
        scale: multiplies the scores.
        bias: whether the first products and the last have biases.
        norm: of latents.
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        sizes: LatentSizes,
        *,
        layer: int,
        scale: float,
        bias: bool,
        norm: NormOptions,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        def linear(inputs: tuple[int, ...], outputs: tuple[int, ...], axes: Axes, *, bias: bool) -> Linear:
            return Linear(inputs, outputs, axes, bias=bias, dtype=dtype, rngs=rngs)

        def make_norm(size: int) -> RMSNorm:
            return RMSNorm((size,), (None,), norm, dtype=dtype, rngs=rngs)

        rank, per_head = sizes.query_latent, sizes.plain + sizes.rotated
        self.query_latent = None if rank is None else linear((embed,), (rank,), ("embed", None), bias=bias)
        self.query_norm = None if rank is None else make_norm(rank)
        self.query = linear((rank or embed,), (heads, per_head), (None, "heads", None), bias=False)
        self.latent = linear((embed,), (sizes.cached,), ("embed", None), bias=bias)
        self.latent_norm = make_norm(sizes.latent)
        self.key = HeadLinear(heads, sizes.plain, sizes.latent, dtype=dtype, rngs=rngs)
        self.value = HeadLinear(heads, sizes.latent, sizes.value, dtype=dtype, rngs=rngs)
        self.output = linear((heads, sizes.value), (embed,), ("heads", None, "embed"), bias=bias)
        self.sizes = sizes
        self.layer = layer
        self.scale = scale

    def __call__(
        self, x: Float[Array, "tokens embed"], cache: Cache, batch: Batch, rotation: Rotation | None
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        """Attends, and returns the cache with this step's latents in it."""
        assert rotation is not None
        made_of = x
        if self.query_latent is not None and self.query_norm is not None:
            made_of = self.query_norm(self.query_latent(x))
        plain, rotated = jnp.split(self.query(made_of), (self.sizes.plain,), axis=-1)
        q = jnp.concatenate([self.key(plain), rotate(rotated, rotation)], axis=-1)
        latent, rotated = jnp.split(self.latent(x)[:, None], (self.sizes.latent,), axis=-1)
        kept = jnp.concatenate([self.latent_norm(latent), rotate(rotated, rotation)], axis=-1)
        group, pool = batch.slot(self.layer)
        attend = sharded_latent_attention(
            jax.sharding.get_abstract_mesh(), self.scale, self.sizes.latent, batch.backend
        )
        out, pages = attend(q, kept, cache[pool], batch.groups[group])
        return self.output(self.value(out)), (*cache[:pool], pages, *cache[pool + 1 :])


@functools.cache
def sharded_latent_attention(
    mesh: AbstractMesh, scale: float, latent: int, backend: Backend
) -> Callable[..., tuple[Array, Array]]:
    """The op over the mesh: each device has heads of its own, and all latents."""
    heads, whole = partition_spec((None, "heads", None)), PartitionSpec()
    pages = pages_spec(backend.layout)

    def attend(q: Array, kept: Array, pool: Array, rows: RaggedBatch) -> tuple[Array, Array]:
        return paged_attention(q, kept, kept[..., :latent], pool, rows, scale=scale, backend=backend)

    return share_over(
        mesh,
        attend,
        in_specs=(heads, whole, pages, whole),
        out_specs=(heads, pages),
        check_vma=False,  # kernels say nothing about how their results vary over the mesh
    )
