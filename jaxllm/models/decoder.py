"""The frame that families share: embedding, a stack of layers, a norm, a head."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers.attention import Attention
from jaxllm.layers.batch import Batch, Cache
from jaxllm.layers.embedding import Embedding
from jaxllm.layers.mlp import GatedMLP
from jaxllm.layers.moe import Mixture
from jaxllm.layers.norm import Norm, RMSNorm
from jaxllm.layers.rope import Rotation
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.models.fields import Fields


@runtime_checkable
class Layer(Protocol):
    """One of the stack."""

    def __call__(
        self, x: Float[Array, "tokens embed"], cache: Cache, batch: Batch, rotation: Rotation | None
    ) -> tuple[Float[Array, "tokens embed"], Cache]: ...


class Decoder(CausalLM):
    """A stack of layers between an embedding and a head; a family gives `configure` and `make_layer`.

    Attributes:
        entrance: names of the parts that `embed` uses.
    """

    entrance: ClassVar[tuple[str, ...]] = ("embedding",)

    @classmethod
    def read_config(
        cls,
        hf: Mapping[str, Any],
        *,
        dtype: Any,
        tensor_parallel_size: int,
        max_model_len: int | None = None,
    ) -> DecoderConfig:
        return cls.configure(Fields(hf, dtype, tensor_parallel_size, max_model_len))

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        """The config that a checkpoint's fields ask for."""
        raise NotImplementedError

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedding = make_embedding(config, rngs)
        self.layers = nnx.List([self.make_layer(config, layer, rngs) for layer in range(config.num_layers)])
        self.norm = self.make_norm(config, rngs)
        self.head = None if config.tie_word_embeddings else make_embedding(config, rngs)

    @staticmethod
    def make_layer(config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> Layer:
        """The layer of that number."""
        raise NotImplementedError

    @staticmethod
    def make_norm(config: DecoderConfig, rngs: nnx.Rngs) -> Norm:
        """The norm before the head."""
        return make_norm(config, rngs)

    def embed(self, tokens: Int[Array, " tokens"], batch: Batch) -> Float[Array, "tokens embed"]:
        """What enters the first layer."""
        x = self.embedding(tokens)
        if self.config.embedding_scale == 1.0:
            return x
        # Rounded to the model's dtype, as models were trained: sqrt(3072) is 55.5 in bfloat16, not 55.43.
        return x * jnp.asarray(self.config.embedding_scale, x.dtype)

    def __call__(
        self, tokens: Int[Array, " tokens"], cache: Cache, batch: Batch
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        x, cache = self.run_layers(self.embed(tokens, batch), cache, batch, range(self.config.num_layers))
        return self.norm(x), cache

    def run_layers(
        self, x: Float[Array, "tokens embed"], cache: Cache, batch: Batch, layers: range
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        """Runs the layers of these numbers, and returns what leaves the last of them."""
        ropes = self.config.layer_ropes
        distinct = dict.fromkeys(ropes[layer] for layer in layers)
        rotations = {rope: None if rope is None else rope.rotation(batch.positions) for rope in distinct}
        for layer in layers:
            x, cache = self.layers[layer](x, cache, batch, rotations[ropes[layer]])
        return x, cache

    def logits(self, hidden: Float[Array, "n embed"]) -> Float[Array, "n vocab"]:
        logits = (self.embedding if self.head is None else self.head).logits(hidden)
        cap = self.config.final_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def make_embedding(config: DecoderConfig, rngs: nnx.Rngs) -> Embedding:
    """A table of the vocabulary."""
    return Embedding(
        config.vocab_size,
        config.hidden_size,
        shares=config.devices_per_layer,
        dtype=config.dtype,
        rngs=rngs,
    )


def make_norm(config: DecoderConfig, rngs: nnx.Rngs) -> RMSNorm:
    """A norm of hidden states."""
    return RMSNorm((config.hidden_size,), ("embed",), config.norm, dtype=config.dtype, rngs=rngs)


def make_attention(config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """The attention of layer number `layer`."""
    return Attention(
        config.hidden_size,
        config.num_heads,
        config.cache_heads,
        config.head_dim,
        layer=layer,
        window=config.layer_windows[layer],
        options=config.attention,
        norm=config.norm,
        dtype=config.dtype,
        rngs=rngs,
    )


def make_mlp(config: DecoderConfig, rngs: nnx.Rngs) -> GatedMLP:
    """A gated feed-forward layer."""
    return GatedMLP(
        config.hidden_size,
        config.intermediate_size,
        activation=config.activation,
        bias=config.mlp_bias,
        dtype=config.dtype,
        rngs=rngs,
    )


def make_mixture(config: DecoderConfig, rngs: nnx.Rngs) -> Mixture:
    """A feed-forward layer of experts."""
    assert config.mixture is not None
    return Mixture(config.hidden_size, config.mixture, dtype=config.dtype, rngs=rngs)
