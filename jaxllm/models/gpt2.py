"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019)."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from converters.families.gpt2 import GPT2 as GPT2_RULES
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.batch import Batch, Cache
from jaxllm.layers.embedding import PositionEmbedding
from jaxllm.layers.mlp import MLP
from jaxllm.layers.norm import LayerNorm, NormOptions
from jaxllm.layers.rope import Rotation
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder, make_attention
from jaxllm.models.fields import Fields

# GPT-2's names of the fields that later families share.
_RENAMED = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}


class GPT2Layer(nnx.Module):
    """Attention and feed-forward, each with a norm before it; all with biases."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = _make_norm(config, rngs)
        self.attention = make_attention(config, layer, rngs)
        self.mlp_norm = _make_norm(config, rngs)
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
            dtype=config.dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "tokens embed"], cache: Cache, batch: Batch, rotation: Rotation | None
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        attended, cache = self.attention(self.attention_norm(x), cache, batch, rotation)
        x += attended
        return x + self.mlp(self.mlp_norm(x)), cache


class GPT2(Decoder):
    """GPT2LMHeadModel."""

    rules = GPT2_RULES
    entrance = ("embedding", "positions")
    make_layer = GPT2Layer

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        self.positions = PositionEmbedding(
            config.max_position_embeddings, config.hidden_size, dtype=config.dtype, rngs=rngs
        )

    @staticmethod
    def make_norm(config: DecoderConfig, rngs: nnx.Rngs) -> LayerNorm:
        return _make_norm(config, rngs)

    def embed(self, tokens: Int[Array, " tokens"], batch: Batch) -> Float[Array, "tokens embed"]:
        return self.embedding(tokens) + self.positions(batch.positions)

    @classmethod
    def read_config(
        cls,
        hf: Mapping[str, Any],
        *,
        dtype: Any,
        tensor_parallel_size: int,
        max_model_len: int | None = None,
    ) -> DecoderConfig:
        common = {_RENAMED.get(name, name): value for name, value in hf.items()}
        return super().read_config(
            common, dtype=dtype, tensor_parallel_size=tensor_parallel_size, max_model_len=max_model_len
        )

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        fields.only("scale_attn_by_inverse_layer_idx", False)
        fields.only("add_cross_attention", False)
        layers, head_dim = fields.whole("num_hidden_layers"), fields.head_dim()
        scale = head_dim**-0.5 if fields.flag("scale_attn_weights", True) else 1.0
        return DecoderConfig(
            **fields.sizes(intermediate_size=4 * fields.whole("hidden_size")),
            head_dim=head_dim,
            norm=NormOptions(fields.number("layer_norm_epsilon", 1e-5)),
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            layer_windows=(None,) * layers,
            layer_ropes=(None,) * layers,
            attention=AttentionOptions(scale, qkv_bias=True, output_bias=True),
            activation=fields.activation("activation_function", "gelu_new"),
            mlp_bias=True,
        )


def _make_norm(config: DecoderConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(config.hidden_size, epsilon=config.norm.epsilon, dtype=config.dtype, rngs=rngs)
