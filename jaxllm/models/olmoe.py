"""OLMoE (https://arxiv.org/abs/2409.02060)."""

from converters.families.experts import OLMOE
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.experts import Gating
from jaxllm.layers.moe import MixtureOptions
from jaxllm.layers.norm import NormOptions
from jaxllm.layers.router import RoutingOptions
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.fields import Fields
from jaxllm.models.mixtral import MixtralLayer


class Olmoe(Decoder):
    """OlmoeForCausalLM: Mixtral's layers, with norms over all of a token's queries and keys."""

    rules = OLMOE
    make_layer = MixtralLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        fields.only("clip_qkv")
        layers, head_dim = fields.whole("num_hidden_layers"), fields.head_dim()
        bias = fields.flag("attention_bias", False)
        activation = fields.activation("hidden_act", "silu")
        routing = RoutingOptions(
            fields.whole("num_experts", 64),
            fields.whole("num_experts_per_tok", 8),
            normalize=fields.flag("norm_topk_prob", False),
        )
        return DecoderConfig(
            **fields.sizes(),
            head_dim=head_dim,
            norm=NormOptions(fields.number("rms_norm_eps", 1e-5)),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            layer_windows=(None,) * layers,
            layer_ropes=(fields.rope(head_dim),) * layers,
            attention=AttentionOptions(head_dim**-0.5, qkv_bias=bias, output_bias=bias, head_norm="all"),
            activation=activation,
            mixture=MixtureOptions(routing, fields.whole("intermediate_size"), Gating(activation)),
        )
