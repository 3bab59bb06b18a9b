"""OLMo 2 (https://arxiv.org/abs/2501.00656)."""

from flax import nnx
from jaxtyping import Array, Float

from converters.families.olmo import OLMO2
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.batch import Batch, Cache
from jaxllm.layers.norm import NormOptions
from jaxllm.layers.rope import Rotation
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder, make_attention, make_mlp, make_norm
from jaxllm.models.fields import Fields


class OlmoLayer(nnx.Module):
    """Attention and feed-forward, each with a norm after it."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> None:
        self.attention = make_attention(config, layer, rngs)
        self.attention_norm = make_norm(config, rngs)
        self.mlp = make_mlp(config, rngs)
        self.mlp_norm = make_norm(config, rngs)

    def __call__(
        self, x: Float[Array, "tokens embed"], cache: Cache, batch: Batch, rotation: Rotation | None
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        attended, cache = self.attention(x, cache, batch, rotation)
        x += self.attention_norm(attended)
        return x + self.mlp_norm(self.mlp(x)), cache


class Olmo2(Decoder):
    """Olmo2ForCausalLM: norms after the layers' parts, and over all of a token's queries and keys."""

    rules = OLMO2
    make_layer = OlmoLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        layers, head_dim = fields.whole("num_hidden_layers"), fields.head_dim()
        bias = fields.flag("attention_bias", False)
        return DecoderConfig(
            **fields.sizes(),
            head_dim=head_dim,
            norm=NormOptions(fields.number("rms_norm_eps", 1e-5)),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            layer_windows=(None,) * layers,
            layer_ropes=(fields.rope(head_dim),) * layers,
            attention=AttentionOptions(head_dim**-0.5, qkv_bias=bias, output_bias=bias, head_norm="all"),
            activation=fields.activation("hidden_act", "silu"),
        )
