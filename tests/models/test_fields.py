"""Configs as old and new transformers write them, and what is refused in them."""

import json
from typing import Any

import pytest
from family_cases import CASES, GOLDENS, MIXTURE_CASES

from jaxllm.models import DecoderConfig, ModelRegistry
from jaxllm.models.fields import resolve_dtype
from jaxllm.runner.identity import describe

SLIDING = ("smollm3", "mistral", "qwen2", "gemma2", "gemma3", "phi3", "mixtral", "qwen2-moe", "gpt-oss")
TIED = ("smollm3", "qwen3", "qwen3-moe", "gemma2", "gemma3", "gpt2")
LATENT = ("deepseek-v2", "deepseek-v3")
QWEN3_LIKE = ("qwen3-moe", "olmoe", "gpt-oss", "deepseek-v2")

# Fields of each family's config that must not be ignored, and values that the golden files do not have.
CHANGES = [
    *((name, "vocab_size", 200) for name in CASES),
    *((name, "tie_word_embeddings", name not in TIED) for name in CASES),
    *((name, "rms_norm_eps", 1e-3) for name in CASES if name != "gpt2"),
    *((name, "num_key_value_heads", 4) for name in CASES if name not in ("gpt2", *LATENT)),
    *((name, "head_dim", 6) for name in CASES if name not in ("gpt2", *LATENT) and "phi3" not in name),
    *((name, "hidden_act", "relu") for name in CASES if "gemma" not in name and "gpt" not in name),
    *(
        (name, "attention_bias", name not in ("llama", "gpt-oss"))
        for name in ("llama", "smollm3", "qwen3", "gemma2", "gemma3", "olmo2", *QWEN3_LIKE)
    ),
    *((name, "mlp_bias", name != "llama") for name in ("llama", "smollm3")),
    *((name, "sliding_window", 20) for name in SLIDING),
    *((name, "hidden_activation", "relu") for name in ("gemma2", "gemma3")),
    *((name, "query_pre_attn_scalar", 77) for name in ("gemma2", "gemma3")),
    *((name, "attn_logit_softcapping", 77.0) for name in ("gemma2", "gemma3")),
    *((name, "final_logit_softcapping", 77.0) for name in ("gemma2", "gemma3")),
    *((name, "num_experts_per_tok", 2) for name in MIXTURE_CASES),
    *((name, "num_local_experts", 16) for name in ("mixtral", "gpt-oss")),
    *((name, "num_experts", 16) for name in ("qwen2-moe", "qwen3-moe", "olmoe")),
    *((name, "intermediate_size", 48) for name in MIXTURE_CASES),
    *((name, "moe_intermediate_size", 24) for name in ("qwen2-moe", "qwen3-moe", *LATENT)),
    *((name, "norm_topk_prob", name != "qwen3-moe") for name in ("qwen2-moe", "qwen3-moe", "olmoe")),
    *((name, "decoder_sparse_step", 3) for name in ("qwen2-moe", "qwen3-moe")),
    *((name, "mlp_only_layers", [0, 1]) for name in ("qwen2-moe", "qwen3-moe")),
    ("qwen2-moe", "shared_expert_intermediate_size", 32),
    ("qwen2-moe", "qkv_bias", False),
    ("qwen2-moe", "use_sliding_window", False),
    *((name, field, 4) for name in LATENT for field in ("kv_lora_rank", "v_head_dim", "qk_nope_head_dim")),
    *((name, "q_lora_rank", 4) for name in LATENT),
    *((name, "n_shared_experts", 3) for name in LATENT),
    *((name, "n_routed_experts", 16) for name in LATENT),
    *((name, "first_k_dense_replace", 2) for name in LATENT),
    *((name, "routed_scaling_factor", 7.0) for name in LATENT),
    ("deepseek-v2", "topk_method", "greedy"),
    ("deepseek-v2", "mlp_bias", True),
    ("deepseek-v3", "norm_topk_prob", False),
    ("deepseek-v3", "q_lora_rank", None),
    ("gpt-oss", "swiglu_limit", 3.0),
    ("gpt-oss", "swiglu_alpha", 1.0),
    ("smollm3", "no_rope_layers", [0, 0, 1]),
    ("smollm3", "use_sliding_window", False),
    ("qwen2", "use_sliding_window", False),
    ("phi3", "original_max_position_embeddings", 32),
    ("gpt2", "n_inner", 160),
    ("gpt2", "n_positions", 32),
    ("gpt2", "activation_function", "relu"),
    ("gpt2", "layer_norm_epsilon", 1e-3),
    ("gpt2", "scale_attn_weights", False),
]


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / name / "config.json").read_text())


def read(hf: dict[str, Any], **options: Any) -> DecoderConfig:
    options = {"dtype": "float32", "tensor_parallel_size": 1} | options
    return ModelRegistry.resolve(hf).read_config(hf, **options)


@pytest.mark.parametrize(("name", "field", "value"), CHANGES)
def test_no_field_is_ignored(name: str, field: str, value: Any) -> None:
    assert read(golden(name) | {field: value}) != read(golden(name))


@pytest.mark.parametrize("name", CASES)
def test_every_config_is_plain_data(name: str) -> None:
    """Else an engine's programs could not be kept whole from start to start."""
    assert describe(read(golden(name)))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("gpt2", "gemma3")])
def test_old_rope_fields_mean_the_same(name: str) -> None:
    new = golden(name)
    old = golden(name)
    scaling = dict(old.pop("rope_parameters"))
    old["rope_theta"] = scaling.pop("rope_theta")
    old["partial_rotary_factor"] = scaling.pop("partial_rotary_factor", 1.0)
    scaling["type"] = scaling.pop("rope_type")
    old["rope_scaling"] = None if scaling["type"] == "default" else scaling
    assert read(old) == read(new)


def test_old_gemma3_fields_mean_the_same() -> None:
    old = golden("gemma3")
    ropes = old.pop("rope_parameters")
    old["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    old["rope_theta"] = ropes["full_attention"].pop("rope_theta")
    old["rope_scaling"] = ropes["full_attention"]
    del old["layer_types"]
    old["sliding_window_pattern"] = 3
    assert read(old) == read(golden("gemma3"))


def test_gemma3_with_a_vision_tower_reads_its_text_config() -> None:
    # As in google/gemma-3-4b-it, which leaves out what is as in transformers' Gemma3TextConfig.
    text: dict[str, Any] = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    config = read({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.layer_windows[:6] == (1024,) * 5 + (None,)
    full, sliding = config.layer_ropes[5], config.layer_ropes[0]
    assert full is not None
    assert sliding is not None
    assert full.frequencies[0] == pytest.approx(1 / 8)
    assert sliding.frequencies[0] == 1.0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"hidden_act": "mish"}, "hidden_act='mish': not supported"),
        ("gemma2", {"hidden_activation": "mish"}, "hidden_activation='mish': not supported"),
        ("llama", {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1.0}}, "rope_type='mrope'"),
        ("llama", {"rope_parameters": {"rope_theta": 1.0, "mrope_section": [1]}}, "mrope_section"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"hidden_size": None}, "hidden_size: missing"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types in config.json: has 1 entries"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias=True"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9: must be from 1 to the number of"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("deepseek-v3", {"topk_group": 5}, "topk_group=5: must be from 1 to n_group=4"),
        ("deepseek-v3", {"n_group": 8, "topk_group": 4}, "n_group=8: groups of one expert have no best two"),
        (
            "deepseek-v3",
            {"first_k_dense_replace": "1"},
            "first_k_dense_replace='1' in config.json",
        ),
        ("deepseek-v2", {"n_shared_experts": "2"}, "n_shared_experts='2' in config.json: must be a whole"),
        ("deepseek-v2", {"n_shared_experts": -1}, "n_shared_experts=-1 .* at least 0"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("gpt-oss", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ],
)
def test_what_is_not_supported_is_named(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(golden(name) | change)


def test_dynamic_rope_beyond_its_context_is_refused() -> None:
    read(golden("llama-dynamic"), max_model_len=128)
    with pytest.raises(ValueError, match=r"max_model_len=129.*max_position_embeddings=128"):
        read(golden("llama-dynamic"), max_model_len=129)


def test_longrope_takes_the_factors_for_the_longest_sequence() -> None:
    short, long = (read(golden("phi3"), max_model_len=length) for length in (16, 17))
    assert short.layer_ropes != long.layer_ropes
    assert long == read(golden("phi3"))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_of_the_checkpoint(key: str) -> None:
    assert resolve_dtype({key: "bfloat16"}) == "bfloat16"
    assert resolve_dtype({"text_config": {key: "torch.float16"}}) == "float16"
    assert resolve_dtype({key: "bfloat16"}, "float32") == "float32"
    assert resolve_dtype({}) == "float32"
    with pytest.raises(ValueError, match="float64"):
        resolve_dtype({key: "float64"})
