"""Llama (https://arxiv.org/abs/2302.13971) 1 to 3, SmolLM2, and what is built like them."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from converters.families.llama import LLAMA
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.batch import Batch, Cache
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
        attended, cache = self.attention(self.attention_norm(x), cache, batch, rotation)
        x += attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(Decoder):
    """LlamaForCausalLM."""

    rules = LLAMA
    make_layer = staticmethod(LlamaLayer)

    @classmethod
    def read_config(
        cls,
        hf: Mapping[str, Any],
        *,
        dtype: Any,
        tensor_parallel_size: int,
        max_model_len: int | None = None,
    ) -> DecoderConfig:
        fields = Fields(hf)
        sizes = fields.sizes()
        bias = fields.flag("attention_bias", False)
        rope = fields.rope(max_model_len=max_model_len)
        return DecoderConfig(
            **sizes,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            layer_windows=(None,) * sizes["num_layers"],
            layer_ropes=(rope,) * sizes["num_layers"],
            attention=AttentionOptions(scale=sizes["head_dim"] ** -0.5, qkv_bias=bias, output_bias=bias),
            activation=fields.activation("hidden_act", "silu"),
            mlp_bias=fields.flag("mlp_bias", False),
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
        )
