"""Phi-3 and Phi-4-mini (https://arxiv.org/abs/2404.14219)."""

from converters.families.phi import PHI3
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.norm import NormOptions
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.fields import Fields
from jaxllm.models.llama import LlamaLayer


class Phi3(Decoder):
    """Phi3ForCausalLM: Llama with LongRoPE and, in some sizes, heads that are rotated only in part."""

    rules = PHI3
    make_layer = LlamaLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
            fields.only(name, False)
        layers, head_dim = fields.whole("num_hidden_layers"), fields.head_dim()
        return DecoderConfig(
            **fields.sizes(),
            head_dim=head_dim,
            norm=NormOptions(fields.number("rms_norm_eps", 1e-5)),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            layer_windows=fields.same_window(None),
            layer_ropes=(fields.rope(head_dim, partial=True, original=4096),) * layers,
            attention=AttentionOptions(head_dim**-0.5),
            activation=fields.activation("hidden_act", "silu"),
        )
