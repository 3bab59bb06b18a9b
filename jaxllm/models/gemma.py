"""Gemma 2 (https://arxiv.org/abs/2408.00118) and the text part of Gemma 3 (https://arxiv.org/abs/2503.19786)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from converters.families.gemma import GEMMA, GEMMA3_MULTIMODAL
from jaxllm.layers.attention import AttentionOptions, HeadNorm
from jaxllm.layers.batch import Batch, Cache
from jaxllm.layers.norm import NormOptions
from jaxllm.layers.rope import Rope, Rotation
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder, make_attention, make_mlp, make_norm
from jaxllm.models.fields import Fields


class GemmaLayer(nnx.Module):
    """Attention and feed-forward, each with a norm before and after it."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = make_norm(config, rngs)
        self.attention = make_attention(config, layer, rngs)
        self.attended_norm = make_norm(config, rngs)
        self.mlp_norm = make_norm(config, rngs)
        self.mlp = make_mlp(config, rngs)
        self.output_norm = make_norm(config, rngs)

    def __call__(
        self, x: Float[Array, "tokens embed"], cache: Cache, batch: Batch, rotation: Rotation | None
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        attended, cache = self.attention(x, cache, batch, rotation, norm=self.attention_norm)
        x += self.attended_norm(attended)
        return x + self.output_norm(self.mlp(x, norm=self.mlp_norm)), cache


class Gemma2(Decoder):
    """Gemma2ForCausalLM: every other layer slides, scores and logits are capped."""

    rules = GEMMA
    make_layer = GemmaLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        layers = fields.whole("num_hidden_layers")
        types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
        ropes = (fields.rope(fields.head_dim(256)),) * layers
        return _configure(fields, fields.windows(types), ropes, None, attention_cap=50.0, final_cap=30.0)


class Gemma3(Decoder):
    """Gemma3ForCausalLM: one layer in six is full, and its positions turn more slowly."""

    rules = GEMMA
    make_layer = GemmaLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        layers, pattern = fields.whole("num_hidden_layers"), fields.whole("sliding_window_pattern", 6)
        types = ["sliding_attention" if (n + 1) % pattern else "full_attention" for n in range(layers)]
        windows = fields.windows(types)
        full, sliding = _ropes(fields)
        ropes = tuple(full if window is None else sliding for window in windows)
        return _configure(fields, windows, ropes, "each", attention_cap=None, final_cap=None)


class Gemma3Multimodal(Gemma3):
    """Gemma3ForConditionalGeneration, of which only the text part is read."""

    rules = GEMMA3_MULTIMODAL

    @classmethod
    def read_config(
        cls,
        hf: Mapping[str, Any],
        *,
        dtype: Any,
        tensor_parallel_size: int,
        max_model_len: int | None = None,
    ) -> DecoderConfig:
        text = {key: value for key, value in (hf.get("text_config") or {}).items() if value is not None}
        text = {**_TEXT_DEFAULTS, **text}
        for name in ("tie_word_embeddings", "quantization_config"):
            if hf.get(name) is not None:
                text[name] = hf[name]
        return super().read_config(
            text, dtype=dtype, tensor_parallel_size=tensor_parallel_size, max_model_len=max_model_len
        )


# Gemma 3's configs leave out what is as in transformers' Gemma3TextConfig.
_TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    """Rotary embeddings of full and of sliding layers."""
    new = fields.get("rope_parameters", {})
    full = {**(new.get("full_attention") or {}), **fields.get("rope_scaling", {})}
    full.setdefault("rope_theta", fields.number("rope_theta", 1000000.0))
    sliding = dict(new.get("sliding_attention") or {})
    sliding.setdefault("rope_theta", fields.number("rope_local_base_freq", 10000.0))
    head_dim = fields.head_dim(256)
    return fields.rope_of(full, head_dim), fields.rope_of(sliding, head_dim)


def _configure(
    fields: Fields,
    windows: tuple[int | None, ...],
    ropes: tuple[Rope, ...],
    head_norm: HeadNorm | None,
    *,
    attention_cap: float | None,
    final_cap: float | None,
) -> DecoderConfig:
    fields.only("use_bidirectional_attention", False)
    bias = fields.flag("attention_bias", False)
    attention = AttentionOptions(
        scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        soft_cap=fields.cap("attn_logit_softcapping", attention_cap),
        qkv_bias=bias,
        output_bias=bias,
        head_norm=head_norm,
    )
    return DecoderConfig(
        **fields.sizes(),
        head_dim=fields.head_dim(256),
        norm=NormOptions(fields.number("rms_norm_eps", 1e-6), zero_centered=True),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        layer_windows=windows,
        layer_ropes=ropes,
        attention=attention,
        activation=fields.activation("hidden_activation", "gelu_pytorch_tanh"),
        embedding_scale=float(np.sqrt(fields.whole("hidden_size"))),
        final_soft_cap=fields.cap("final_logit_softcapping", final_cap),
    )
