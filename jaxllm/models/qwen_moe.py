"""Qwen's mixtures of experts: Qwen1.5-MoE and Qwen2 (https://arxiv.org/abs/2407.10671), Qwen3."""

from converters.families.experts import QWEN_MOE
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.experts import Gating
from jaxllm.layers.moe import MixtureOptions
from jaxllm.layers.norm import NormOptions
from jaxllm.layers.router import RoutingOptions
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.fields import Fields
from jaxllm.models.mixtral import make_sparse_layer


class Qwen2Moe(Decoder):
    """Qwen2MoeForCausalLM: beside those that are chosen, one gated expert for all tokens."""

    rules = QWEN_MOE
    make_layer = staticmethod(make_sparse_layer)

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        layers, head_dim = fields.whole("num_hidden_layers"), fields.head_dim()
        slides = fields.flag("use_sliding_window", False)
        last = fields.get("max_window_layers", 28)
        types = [
            "sliding_attention" if slides and layer % 2 == 0 and layer < last else "full_attention"
            for layer in range(layers)
        ]
        return _configure(
            fields,
            head_dim,
            AttentionOptions(head_dim**-0.5, qkv_bias=fields.flag("qkv_bias", True)),
            fields.windows(types) if slides else (None,) * layers,
            _mixture(fields, experts=60, per_token=4, size=1408, shared_size=5632),
        )


class Qwen3Moe(Decoder):
    """Qwen3MoeForCausalLM: Qwen3 with experts."""

    rules = QWEN_MOE
    make_layer = staticmethod(make_sparse_layer)

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        head_dim = fields.head_dim()
        bias = fields.flag("attention_bias", False)
        options = AttentionOptions(head_dim**-0.5, qkv_bias=bias, output_bias=bias, head_norm="each")
        slides = fields.flag("use_sliding_window", False)
        windows = fields.same_window(4096) if slides else (None,) * fields.whole("num_hidden_layers")
        mixture = _mixture(fields, experts=128, per_token=8, size=768)
        return _configure(fields, head_dim, options, windows, mixture)


def _mixture(
    fields: Fields, *, experts: int, per_token: int, size: int, shared_size: int | None = None
) -> MixtureOptions:
    """What both read alike; the numbers are the defaults, and without a shared expert its size is None."""
    routing = RoutingOptions(
        # transformers 5 writes Qwen3's number under the name that Mixtral has for it
        fields.whole("num_experts", fields.get("num_local_experts", experts)),
        fields.whole("num_experts_per_tok", per_token),
        normalize=fields.flag("norm_topk_prob", False),
    )
    shared = 0 if shared_size is None else fields.whole("shared_expert_intermediate_size", shared_size)
    return MixtureOptions(
        routing,
        fields.whole("moe_intermediate_size", size),
        Gating(fields.activation("hidden_act", "silu")),
        shared_size=shared,
        shared_gate=shared_size is not None,
    )


def _dense_layers(fields: Fields) -> frozenset[int]:
    """Layers without experts: those listed, and all but every `decoder_sparse_step`-th."""
    layers, step = fields.whole("num_hidden_layers"), fields.whole("decoder_sparse_step", 1)
    listed = fields.get("mlp_only_layers", [])
    return frozenset(layer for layer in range(layers) if layer in listed or (layer + 1) % step)


def _configure(
    fields: Fields,
    head_dim: int,
    attention: AttentionOptions,
    windows: tuple[int | None, ...],
    mixture: MixtureOptions,
) -> DecoderConfig:
    return DecoderConfig(
        **fields.sizes(),
        head_dim=head_dim,
        norm=NormOptions(fields.number("rms_norm_eps", 1e-6)),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        layer_windows=windows,
        layer_ropes=(fields.rope(head_dim),) * fields.whole("num_hidden_layers"),
        attention=attention,
        activation=mixture.gating.activation,
        mixture=mixture,
        dense_layers=_dense_layers(fields),
    )
