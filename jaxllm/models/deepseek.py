"""DeepSeek-V2 (https://arxiv.org/abs/2405.04434), and DeepSeek-V3 and R1 (https://arxiv.org/abs/2412.19437)."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from converters.families.deepseek import DEEPSEEK
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.batch import Batch, Cache
from jaxllm.layers.experts import Gating
from jaxllm.layers.latent_attention import LatentAttention, LatentSizes
from jaxllm.layers.moe import Mixture, MixtureOptions
from jaxllm.layers.norm import NormOptions
from jaxllm.layers.rope import Rotation
from jaxllm.layers.router import RoutingOptions
from jaxllm.models.base import DecoderConfig
from jaxllm.models.decoder import Decoder, make_mixture, make_mlp, make_norm
from jaxllm.models.fields import Fields
from jaxllm.models.rope_scaling import yarn_scale

LATENT_NORM = NormOptions(1e-6)
"""Of latents, whatever `rms_norm_eps` is."""


class DeepseekLayer(nnx.Module):
    """Latent attention, and experts, or in the first layers a plain feed-forward layer, after a norm each."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> None:
        assert config.latent is not None
        self.attention_norm = make_norm(config, rngs)
        self.attention = LatentAttention(
            config.hidden_size,
            config.num_heads,
            config.latent,
            layer=layer,
            scale=config.attention.scale,
            bias=config.attention.output_bias,
            norm=LATENT_NORM,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.mlp_norm = make_norm(config, rngs)
        dense = layer in config.dense_layers
        self.mlp = make_mlp(config, rngs) if dense else make_mixture(config, rngs)

    def __call__(
        self, x: Float[Array, "tokens embed"], cache: Cache, batch: Batch, rotation: Rotation | None
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        attended, cache = self.attention(self.attention_norm(x), cache, batch, rotation)
        x += attended
        normed = self.mlp_norm(x)
        return x + (self.mlp(normed, batch) if isinstance(self.mlp, Mixture) else self.mlp(normed)), cache


class DeepseekV2(Decoder):
    """DeepseekV2ForCausalLM: experts are weighted by a softmax over all of them."""

    rules = DEEPSEEK
    make_layer = DeepseekLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        fields.only("topk_method", "greedy", "group_limited_greedy")
        fields.only("scoring_func", "softmax")
        fields.only("norm_topk_prob", False)
        limited = fields.get("topk_method", "greedy") == "group_limited_greedy"
        routing = RoutingOptions(
            fields.whole("n_routed_experts", 64),
            fields.whole("num_experts_per_tok"),
            normalize=False,
            scale=fields.number("routed_scaling_factor", 1.0),
            **(_groups(fields) if limited else {}),
        )
        mlp_bias = fields.flag("mlp_bias", False)
        return _configure(fields, routing, shared=2, dense=0, size=1407, mlp_bias=mlp_bias)


class DeepseekV3(Decoder):
    """DeepseekV3ForCausalLM: each expert has a score of its own, and a bias that spreads tokens evenly."""

    rules = DEEPSEEK
    make_layer = DeepseekLayer

    @classmethod
    def configure(cls, fields: Fields) -> DecoderConfig:
        fields.only("topk_method", "noaux_tc")
        fields.only("scoring_func", "sigmoid")
        fields.only("rope_interleave", True)
        routing = RoutingOptions(
            fields.whole("n_routed_experts", 256),
            fields.whole("num_experts_per_tok", 8),
            scoring="sigmoid",
            normalize=fields.flag("norm_topk_prob", True),
            scale=fields.number("routed_scaling_factor", 2.5),
            correction=True,
            group_score="best two",
            **_groups(fields, 8, 4),
        )
        return _configure(fields, routing, shared=1, dense=3, size=2048)


def _groups(fields: Fields, groups: int | None = None, chosen: int | None = None) -> dict[str, Any]:
    """How many groups of experts, and how many of them a token may choose from; None: there is no default."""
    return {
        "groups": fields.whole("n_group", groups),
        "groups_per_token": fields.whole("topk_group", chosen),
    }


def _configure(
    fields: Fields, routing: RoutingOptions, *, shared: int, dense: int, size: int, **options: Any
) -> DecoderConfig:
    """What both read alike; the numbers are the defaults."""
    fields.only("moe_layer_freq", 1)
    fields.only("pretraining_tp", 1)
    layers, activation = fields.whole("num_hidden_layers"), fields.activation("hidden_act", "silu")
    sizes = LatentSizes(
        latent=fields.whole("kv_lora_rank", 512),
        query_latent=None if fields.is_null("q_lora_rank") else fields.whole("q_lora_rank", 1536),
        plain=fields.whole("qk_nope_head_dim", 128),
        rotated=fields.whole("qk_rope_head_dim", 64),
        value=fields.whole("v_head_dim", 128),
    )
    expert = fields.whole("moe_intermediate_size", size)
    first = fields.whole("first_k_dense_replace", dense, least=0)
    # Experts that all tokens go through are as good as one that is as wide as all of them.
    none = fields.is_null("n_shared_experts")
    wide = expert * (0 if none else fields.whole("n_shared_experts", shared, least=0))
    return DecoderConfig(
        **{**fields.sizes(), "num_kv_heads": 1},
        head_dim=sizes.cached,
        latent=sizes,
        norm=NormOptions(fields.number("rms_norm_eps", 1e-6)),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        layer_windows=(None,) * layers,
        layer_ropes=(fields.rope(sizes.rotated),) * layers,
        attention=AttentionOptions(
            (sizes.plain + sizes.rotated) ** -0.5 * _stretch(fields) ** 2,
            output_bias=fields.flag("attention_bias", False),
        ),
        activation=activation,
        mixture=MixtureOptions(routing, expert, Gating(activation), shared_size=wide),
        dense_layers=tuple(range(min(first, layers))),
        **options,
    )


def _stretch(fields: Fields) -> float:
    """By which YaRN multiplies queries and keys: of these models it is in the scale, not in the angles."""
    parameters = fields.rope_parameters()
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    weight = parameters.get("mscale_all_dim") or 0
    if kind == "default" or not weight:
        return 1.0
    if not parameters.get("factor"):
        raise ValueError("rope_parameters: factor is missing, which mscale_all_dim needs")
    return yarn_scale(parameters["factor"], weight)
