"""gpt-oss (https://arxiv.org/abs/2508.10925)."""

from converters.families.gpt_oss import GPT_OSS
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.experts import Gating
from jaxllm.layers.moe import MixtureOptions
from jaxllm.layers.norm import NormOptions
from jaxllm.layers.router import RoutingOptions
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.fields import Fields
from jaxllm.models.mixtral import MixtralLayer


class GptOss(Decoder):
    """GptOssForCausalLM: attention sinks, every other layer slides, biases everywhere, a clamped SwiGLU."""

    rules = GPT_OSS
    make_layer = MixtralLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        fields.only("hidden_act", "silu")
        layers, head_dim = fields.whole("num_hidden_layers"), fields.head_dim(64)
        types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
        bias = fields.flag("attention_bias", True)
        routing = RoutingOptions(
            fields.whole("num_local_experts", 128), fields.whole("num_experts_per_tok", 4), bias=True
        )
        gating = Gating(limit=fields.number("swiglu_limit", 7.0), alpha=fields.number("swiglu_alpha", 1.702))
        return DecoderConfig(
            **fields.sizes(),
            head_dim=head_dim,
            norm=NormOptions(fields.number("rms_norm_eps", 1e-5)),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            layer_windows=fields.windows(types),
            layer_ropes=(fields.rope(head_dim, theta=150000.0),) * layers,
            attention=AttentionOptions(head_dim**-0.5, qkv_bias=bias, output_bias=bias, sinks=True),
            mixture=MixtureOptions(routing, fields.whole("intermediate_size"), gating, bias=True),
        )
