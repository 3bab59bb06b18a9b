"""Llama (https://arxiv.org/abs/2302.13971) 1 to 3 and SmolLM2."""

from flax import nnx
from jaxtyping import Array, Float

from converters.families.llama import LLAMA
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.batch import Batch, Cache
from jaxllm.layers.norm import NormOptions
from jaxllm.layers.rope import Rotation
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder, make_attention, make_mlp, make_norm
from jaxllm.models.fields import Fields


class LlamaLayer(nnx.Module):
    """Attention and feed-forward, each with a norm before it."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = make_norm(config, rngs)
        self.attention = make_attention(config, layer, rngs)
        self.mlp_norm = make_norm(config, rngs)
        self.mlp = make_mlp(config, rngs)

    def __call__(
        self, x: Float[Array, "tokens embed"], cache: Cache, batch: Batch, rotation: Rotation | None
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        x, cache = self.attention(x, cache, batch, rotation, norm=self.attention_norm, residual=x)
        return self.mlp(x, norm=self.mlp_norm, residual=x), cache


class Llama(Decoder):
    """LlamaForCausalLM."""

    rules = LLAMA
    make_layer = LlamaLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        layers, head_dim = fields.whole("num_hidden_layers"), fields.head_dim()
        bias = fields.flag("attention_bias", False)
        return DecoderConfig(
            **fields.sizes(),
            head_dim=head_dim,
            norm=NormOptions(fields.number("rms_norm_eps", 1e-6)),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            layer_windows=(None,) * layers,
            layer_ropes=(fields.rope(head_dim),) * layers,
            attention=AttentionOptions(head_dim**-0.5, qkv_bias=bias, output_bias=bias),
            activation=fields.activation("hidden_act", "silu"),
            mlp_bias=fields.flag("mlp_bias", False),
        )
