"""Small models, one or more for each family, that parity with transformers is tested on.

Sizes and values are chosen so that everything matters: windows and original contexts are shorter than the
prompts, soft caps lie where the scores are, key-value heads are fewer than heads and than the devices of a
mesh, the vocabulary does not divide by these.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).parent / "goldens"
PROMPT_LENGTHS = (41, 23)
DECODE_STEPS = 16

_COMMON = {
    "vocab_size": 125,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_SLIDING = {"num_hidden_layers": 3, "sliding_window": 9}


@dataclass(frozen=True)
class Case:
    """One small model.

    Attributes:
        architecture: a class of transformers.
        config: arguments of its config class.
        weights: the case whose weights it shares, where it is not its own.
        max_model_len: the engine's limit, where it decides about frequencies.
    """

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    max_model_len: int | None = None


_LLAMA = {**_COMMON, "attention_bias": True, "mlp_bias": True, "rope_theta": 500.0}
_PHI3 = {
    **_COMMON,
    "sliding_window": 11,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 16,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.3],
        "long_factor": [1.5, 2.0, 4.0],
    },
}
_GEMMA3 = {
    **_COMMON,
    **_SLIDING,
    "head_dim": 12,
    "query_pre_attn_scalar": 24,
    "sliding_window_pattern": 3,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}


def _scaled(**scaling: Any) -> Case:
    return Case("LlamaForCausalLM", {**_LLAMA, "rope_scaling": scaling}, weights="llama")


DENSE_CASES: dict[str, Case] = {
    "llama": Case("LlamaForCausalLM", _LLAMA),
    "llama-linear": _scaled(rope_type="linear", factor=3.0),
    "llama-dynamic": _scaled(rope_type="dynamic", factor=2.0),
    "llama-llama3": _scaled(
        rope_type="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "llama-yarn": _scaled(
        rope_type="yarn", factor=4.0, beta_fast=4.0, beta_slow=1.0, original_max_position_embeddings=32
    ),
    "llama-yarn-mscale": _scaled(
        rope_type="yarn",
        factor=4.0,
        mscale=2.0,
        mscale_all_dim=0.5,
        truncate=False,
        original_max_position_embeddings=32,
    ),
    "smollm3": Case(
        "SmolLM3ForCausalLM",
        {
            **_COMMON,
            **_SLIDING,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "tie_word_embeddings": True,
            "rope_theta": 1000.0,
        },
    ),
    "mistral": Case("MistralForCausalLM", {**_COMMON, "sliding_window": 9, "head_dim": 12}),
    "qwen2": Case(
        "Qwen2ForCausalLM",
        {**_COMMON, **_SLIDING, "use_sliding_window": True, "max_window_layers": 1, "rope_theta": 1000.0},
    ),
    "qwen3": Case(
        "Qwen3ForCausalLM",
        {**_COMMON, "head_dim": 12, "tie_word_embeddings": True, "rope_theta": 1000.0},
    ),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        {
            **_COMMON,
            **_SLIDING,
            "head_dim": 12,
            "query_pre_attn_scalar": 40,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 12.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": Case("Gemma3ForCausalLM", _GEMMA3),
    "phi3-short": Case(
        "Phi3ForCausalLM",
        {**_PHI3, "original_max_position_embeddings": 96},
        weights="phi3",
        max_model_len=96,
    ),
    "phi3": Case("Phi3ForCausalLM", _PHI3),
    "olmo2": Case("Olmo2ForCausalLM", {**_COMMON, "rope_theta": 1000.0}),
    "gpt2": Case(
        "GPT2LMHeadModel",
        {
            "vocab_size": 125,
            "n_positions": 64,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}

_MIXTURE = {**_COMMON, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3}

_DEEPSEEK = {
    **_COMMON,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rope_theta": 1000.0,
}

# New ones come last: a case's place decides about its weights.
MIXTURE_CASES: dict[str, Case] = {
    "mixtral": Case(
        "MixtralForCausalLM",
        {
            **_COMMON,
            "intermediate_size": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 12,
            "rope_theta": 1000.0,
        },
    ),
    "qwen2-moe": Case(
        "Qwen2MoeForCausalLM",
        {
            **_MIXTURE,
            **_SLIDING,
            "use_sliding_window": True,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [1],
            "rope_theta": 1000.0,
        },
    ),
    "qwen3-moe": Case(
        "Qwen3MoeForCausalLM",
        {
            **_MIXTURE,
            "num_hidden_layers": 3,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "head_dim": 12,
            "tie_word_embeddings": True,
            "rope_theta": 1000.0,
        },
    ),
    "olmoe": Case(
        "OlmoeForCausalLM",
        {
            **_COMMON,
            "intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "rope_theta": 1000.0,
        },
    ),
    "gpt-oss": Case(
        "GptOssForCausalLM",
        {
            **_COMMON,
            **_SLIDING,
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 12,
            "swiglu_limit": 1.5,
            "rope_theta": 1000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "deepseek-v2": Case(
        "DeepseekV2ForCausalLM",
        {
            **_DEEPSEEK,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "n_shared_experts": 2,
            "routed_scaling_factor": 4.0,
        },
    ),
    "deepseek-v3": Case(
        "DeepseekV3ForCausalLM",
        {
            **_DEEPSEEK,
            "q_lora_rank": 40,
            "attention_bias": True,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}

CASES: dict[str, Case] = {**DENSE_CASES, **MIXTURE_CASES}
SEEDS = {name: seed for seed, name in enumerate([*sorted(DENSE_CASES), *MIXTURE_CASES])}

# What has too many weights for a golden file.
LIVE_CASES: dict[str, Case] = {
    **CASES,
    "gemma3-multimodal": Case(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _GEMMA3,
            "mm_tokens_per_image": 4,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
    ),
}
