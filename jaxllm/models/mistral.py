"""Mistral (https://arxiv.org/abs/2310.06825): Llama with a sliding window on every layer."""

from converters.families.llama import LLAMA
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.norm import NormOptions
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.fields import Fields
from jaxllm.models.llama import LlamaLayer


class Mistral(Decoder):
    """MistralForCausalLM."""

    rules = LLAMA
    make_layer = LlamaLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        fields.only("layer_types")
        layers, head_dim = fields.whole("num_hidden_layers"), fields.head_dim()
        return DecoderConfig(
            **fields.sizes(),
            head_dim=head_dim,
            norm=NormOptions(fields.number("rms_norm_eps", 1e-6)),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            layer_windows=fields.same_window(4096),
            layer_ropes=(fields.rope(head_dim),) * layers,
            attention=AttentionOptions(head_dim**-0.5),
            activation=fields.activation("hidden_act", "silu"),
        )
