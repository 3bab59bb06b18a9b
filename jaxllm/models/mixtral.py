"""Mixtral (https://arxiv.org/abs/2401.04088): Mistral with experts in place of its feed-forward layers."""

from flax import nnx
from jaxtyping import Array, Float

from converters.families.mixtral import MIXTRAL
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.batch import Batch, Cache
from jaxllm.layers.experts import Gating
from jaxllm.layers.moe import MixtureOptions
from jaxllm.layers.norm import NormOptions
from jaxllm.layers.rope import Rotation
from jaxllm.layers.router import RoutingOptions
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder, make_attention, make_mixture, make_norm
from jaxllm.models.fields import Fields
from jaxllm.models.llama import LlamaLayer


class MixtralLayer(nnx.Module):
    """Attention and experts, each with a norm before it."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = make_norm(config, rngs)
        self.attention = make_attention(config, layer, rngs)
        self.mlp_norm = make_norm(config, rngs)
        self.mlp = make_mixture(config, rngs)

    def __call__(
        self, x: Float[Array, "tokens embed"], cache: Cache, batch: Batch, rotation: Rotation | None
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        x, cache = self.attention(x, cache, batch, rotation, norm=self.attention_norm, residual=x)
        return x + self.mlp(self.mlp_norm(x), batch), cache


def make_sparse_layer(config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> MixtralLayer | LlamaLayer:
    """A layer with experts, unless it is one of those that have none."""
    return (LlamaLayer if layer in config.dense_layers else MixtralLayer)(config, layer, rngs)


class Mixtral(Decoder):
    """MixtralForCausalLM."""

    rules = MIXTRAL
    make_layer = MixtralLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        layers, head_dim = fields.whole("num_hidden_layers"), fields.head_dim()
        activation = fields.activation("hidden_act", "silu")
        routing = RoutingOptions(fields.whole("num_local_experts", 8), fields.whole("num_experts_per_tok", 2))
        return DecoderConfig(
            **fields.sizes(),
            head_dim=head_dim,
            norm=NormOptions(fields.number("rms_norm_eps", 1e-5)),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            layer_windows=fields.same_window(None),
            layer_ropes=(fields.rope(head_dim, theta=1000000.0),) * layers,
            attention=AttentionOptions(head_dim**-0.5),
            activation=activation,
            mixture=MixtureOptions(routing, fields.whole("intermediate_size"), Gating(activation)),
        )
