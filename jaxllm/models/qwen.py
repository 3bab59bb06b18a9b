"""Qwen2 and 2.5 (https://arxiv.org/abs/2412.15115), and Qwen3 (https://arxiv.org/abs/2505.09388)."""

from converters.families.llama import LLAMA
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.norm import NormOptions
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.fields import Fields
from jaxllm.models.llama import LlamaLayer


class Qwen2(Decoder):
    """Qwen2ForCausalLM: Llama with biases on queries, keys and values."""

    rules = LLAMA
    make_layer = LlamaLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        head_dim = fields.head_dim()
        return _configure(fields, head_dim, AttentionOptions(head_dim**-0.5, qkv_bias=True))


class Qwen3(Decoder):
    """Qwen3ForCausalLM: Llama with a norm on each head's query and key."""

    rules = LLAMA
    make_layer = LlamaLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        head_dim = fields.head_dim(128)
        bias = fields.flag("attention_bias", False)
        options = AttentionOptions(head_dim**-0.5, qkv_bias=bias, output_bias=bias, head_norm="each")
        return _configure(fields, head_dim, options)


def _configure(fields: Fields, head_dim: int, attention: AttentionOptions) -> DecoderConfig:
    layers = fields.whole("num_hidden_layers")
    slides = fields.flag("use_sliding_window", False) and fields.get("sliding_window", 4096) is not None
    first = fields.get("max_window_layers", 28)
    types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    return DecoderConfig(
        **fields.sizes(),
        head_dim=head_dim,
        norm=NormOptions(fields.number("rms_norm_eps", 1e-6)),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        layer_windows=fields.windows(types) if slides else (None,) * layers,
        layer_ropes=(fields.rope(head_dim),) * layers,
        attention=attention,
        activation=fields.activation("hidden_act", "silu"),
    )
