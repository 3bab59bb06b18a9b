"""SmolLM3 (https://huggingface.co/blog/smollm3): Llama, with some layers that have no positions."""

from converters.families.llama import LLAMA
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.norm import NormOptions
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.fields import Fields
from jaxllm.models.llama import LlamaLayer


class SmolLM3(Decoder):
    """SmolLM3ForCausalLM."""

    rules = LLAMA
    make_layer = LlamaLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        layers, head_dim = fields.whole("num_hidden_layers"), fields.head_dim()
        bias = fields.flag("attention_bias", False)
        interval = fields.whole("no_rope_layer_interval", 4)
        rotated = fields.get("no_rope_layers", [(layer + 1) % interval != 0 for layer in range(layers)])
        if len(rotated) < layers:
            raise ValueError(f"no_rope_layers in config.json: has {len(rotated)} entries, must have {layers}")
        slides = fields.flag("use_sliding_window", False) and fields.get("sliding_window", None) is not None
        types = ["full_attention" if turn or not slides else "sliding_attention" for turn in rotated[:layers]]
        rope = fields.rope(head_dim, theta=2000000.0)
        return DecoderConfig(
            **fields.sizes(),
            head_dim=head_dim,
            norm=NormOptions(fields.number("rms_norm_eps", 1e-6)),
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            layer_windows=fields.windows(types) if slides else (None,) * layers,
            layer_ropes=tuple(rope if turn else None for turn in rotated[:layers]),
            attention=AttentionOptions(head_dim**-0.5, qkv_bias=bias, output_bias=bias),
            activation=fields.activation("hidden_act", "silu"),
            mlp_bias=fields.flag("mlp_bias", False),
        )
