"""GGUF checkpoints: names, shapes, values and configs as transformers has them."""

import math
from pathlib import Path
from typing import Any

import gguf
import gguf_made
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_made import HEAD_DIM, HEADS, HIDDEN, KEY, KV_HEADS, LAYERS, MLP, QUERY, VOCAB

from converters.checkpoint import open_checkpoint
from converters.errors import CheckpointError
from converters.gguf import GGUFCheckpoint
from converters.gguf_config import LLAMA3_ROPE
from converters.gguf_names import ARCHITECTURES
from jaxllm.models import ModelRegistry, split
from jaxllm.models.loading import load_weights
from jaxllm.parallel import make_mesh

ENDS = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
ATTENTION = {
    "self_attn.q_proj.weight": (QUERY, HIDDEN),
    "self_attn.k_proj.weight": (KEY, HIDDEN),
    "self_attn.v_proj.weight": (KEY, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, QUERY),
}
BIASES = {f"self_attn.{p}_proj.bias": (QUERY if p == "q" else KEY,) for p in "qkv"}
HEAD_NORMS = {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}
MATRICES = {"mlp.gate_proj.weight": (MLP, HIDDEN), "mlp.up_proj.weight": (MLP, HIDDEN)}
FEED_FORWARD = {**MATRICES, "mlp.down_proj.weight": (HIDDEN, MLP)}
NORMS = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
FFN_NORMS = {f"{place}_feedforward_layernorm.weight": (HIDDEN,) for place in ("pre", "post")}
EXPERTS = {
    "mlp.gate.weight": (8, HIDDEN),
    "mlp.experts.gate_proj.weight": (8, MLP, HIDDEN),
    "mlp.experts.up_proj.weight": (8, MLP, HIDDEN),
    "mlp.experts.down_proj.weight": (8, HIDDEN, MLP),
}
SHARED = {
    "mlp.shared_expert.gate_proj.weight": (24, HIDDEN),
    "mlp.shared_expert.up_proj.weight": (24, HIDDEN),
    "mlp.shared_expert.down_proj.weight": (HIDDEN, 24),
    "mlp.shared_expert_gate.weight": (HIDDEN,),
}
MIXTURE = {"expert_count": 8, "expert_used_count": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2moe": {
        **MIXTURE,
        "expert_feed_forward_length": MLP,
        "expert_shared_feed_forward_length": 24,
    },
    "qwen3moe": {**MIXTURE, "expert_feed_forward_length": MLP},
    "olmoe": MIXTURE,
}
LAYER: dict[str, dict[str, tuple[int, ...]]] = {
    "llama": {**ATTENTION, **BIASES, **FEED_FORWARD, **NORMS},
    "smollm3": {**ATTENTION, **FEED_FORWARD, **NORMS},
    "qwen2": {**ATTENTION, **BIASES, **FEED_FORWARD, **NORMS},
    "qwen3": {**ATTENTION, **HEAD_NORMS, **FEED_FORWARD, **NORMS},
    "qwen2moe": {**ATTENTION, **BIASES, **EXPERTS, **SHARED, **NORMS},
    "qwen3moe": {**ATTENTION, **HEAD_NORMS, **EXPERTS, **NORMS},
    "olmoe": {
        **ATTENTION,
        "self_attn.q_norm.weight": (QUERY,),
        "self_attn.k_norm.weight": (KEY,),
        **EXPERTS,
        **NORMS,
    },
    "gemma2": {**ATTENTION, **FEED_FORWARD, **NORMS, **FFN_NORMS},
    "gemma3": {**ATTENTION, **HEAD_NORMS, **FEED_FORWARD, **NORMS, **FFN_NORMS},
    "olmo2": {
        **ATTENTION,
        "self_attn.q_norm.weight": (QUERY,),
        "self_attn.k_norm.weight": (KEY,),
        **FEED_FORWARD,
        "post_attention_layernorm.weight": (HIDDEN,),
        "post_feedforward_layernorm.weight": (HIDDEN,),
    },
    "phi3": {
        "self_attn.qkv_proj.weight": (QUERY + 2 * KEY, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, QUERY),
        "mlp.gate_up_proj.weight": (2 * MLP, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, MLP),
        **NORMS,
    },
}


def tensors_of(architecture: str) -> dict[str, np.ndarray]:
    """A model's tensors under transformers' names."""
    if architecture == "gpt2":
        layer = {
            "attn.c_attn.weight": (HIDDEN, 3 * HIDDEN),
            "attn.c_attn.bias": (3 * HIDDEN,),
            "attn.c_proj.weight": (HIDDEN, HIDDEN),
            "attn.c_proj.bias": (HIDDEN,),
            "mlp.c_fc.weight": (HIDDEN, MLP),
            "mlp.c_fc.bias": (MLP,),
            "mlp.c_proj.weight": (MLP, HIDDEN),
            "mlp.c_proj.bias": (HIDDEN,),
            **{f"ln_{n}.{part}": (HIDDEN,) for n in (1, 2) for part in ("weight", "bias")},
        }
        shapes = {"transformer.wte.weight": (VOCAB, HIDDEN), "transformer.wpe.weight": (512, HIDDEN)}
        shapes |= {f"transformer.ln_f.{part}": (HIDDEN,) for part in ("weight", "bias")}
        shapes |= {f"transformer.h.{i}.{name}": s for i in range(LAYERS) for name, s in layer.items()}
    else:
        shapes = dict(ENDS)
        layer = LAYER[architecture]
        shapes |= {f"model.layers.{i}.{name}": s for i in range(LAYERS) for name, s in layer.items()}
        if architecture in ("qwen2", "olmo2", "phi3"):
            shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def make(
    path: Path, architecture: str, settings: dict[str, Any] | None = None, **extra: Any
) -> GGUFCheckpoint:
    stored = gguf_made.to_llama_cpp(architecture, tensors_of(architecture)) | extra.pop("stored", {})
    typed = {name: (values, Kind.F32) for name, values in stored.items()}
    settings = SETTINGS.get(architecture, {}) | (settings or {})
    return GGUFCheckpoint(gguf_made.write(path / "m.gguf", architecture, typed, settings, **extra))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_come_out_as_transformers_has_them(architecture: str, tmp_path: Path):
    expected = tensors_of(architecture)
    checkpoint = make(tmp_path, architecture)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: values.shape for name, values in expected.items()
    }
    for name, values in expected.items():
        np.testing.assert_allclose(checkpoint.read(name), values, rtol=0, atol=3e-7, err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_accepts_the_config(architecture: str, tmp_path: Path):
    from transformers import AutoConfig

    config = make(tmp_path, architecture).config
    # The class knows the field names: what it does not know it keeps as it is, so look for what it computes.
    known = AutoConfig.for_model(**config)
    assert known.architectures == config["architectures"]
    assert (known.num_hidden_layers, known.hidden_size, known.vocab_size) == (LAYERS, HIDDEN, VOCAB)
    assert known.num_attention_heads == HEADS
    assert known.max_position_embeddings == 512
    assert known.tie_word_embeddings == (architecture not in ("qwen2", "olmo2", "phi3"))
    if architecture != "gpt2":
        assert known.num_key_value_heads == KV_HEADS
        assert known.intermediate_size == MLP


@pytest.mark.parametrize("architecture", [*SETTINGS, "llama"])
def test_experts_are_loaded(architecture: str, tmp_path: Path):
    """From llama.cpp's merged tensors, those of Mixtral from a Llama's with experts."""
    layer = {**ATTENTION, **EXPERTS, **NORMS} if architecture == "llama" else LAYER[architecture]
    shapes = ENDS | {f"model.layers.{i}.{name}": s for i in range(LAYERS) for name, s in layer.items()}
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    typed = {k: (v, Kind.F32) for k, v in gguf_made.to_llama_cpp(architecture, tensors).items()}
    settings = SETTINGS.get(architecture, MIXTURE)
    checkpoint = GGUFCheckpoint(gguf_made.write(tmp_path / "m.gguf", architecture, typed, settings))
    model = ModelRegistry.resolve(checkpoint.config)
    config = model.read_config(checkpoint.config, dtype="float32", tensor_parallel_size=1)
    _, parameters = split(model, config)
    arrays = load_weights(checkpoint, model.rules, parameters, config.geometry, make_mesh(1), progress=False)
    loaded = dict(zip(parameters, arrays, strict=True))
    joined = np.asarray(loaded["layers.1.mlp.experts.gate_up.weight"])
    gate_up = joined.reshape(*joined.shape[:2], 2, -1)
    down = np.asarray(loaded["layers.1.mlp.experts.down.weight"])
    for half, part in enumerate(("gate", "up")):
        expected = tensors[f"model.layers.1.mlp.experts.{part}_proj.weight"]
        np.testing.assert_array_equal(gate_up[:, :, half].swapaxes(1, 2), expected)
    np.testing.assert_array_equal(down.swapaxes(1, 2), tensors["model.layers.1.mlp.experts.down_proj.weight"])
    assert config.mixture is not None
    assert (config.mixture.routing.experts, config.mixture.routing.per_token) == (8, 3)
    assert config.mixture.routing.normalize == (architecture in ("qwen3moe", "llama"))
    if architecture == "qwen2moe":
        assert loaded["layers.0.mlp.shared_gate.weight"].shape == (HIDDEN, 1)


def test_numbers_keep_the_digits_that_were_written(tmp_path: Path):
    settings = {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 500000.0}
    config = make(tmp_path, "llama", settings).config
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-6, 500000.0)


def llama3_factors(base: float, factor: float) -> np.ndarray:
    """As llama.cpp's converter computes them, frequency by frequency."""
    factors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * base ** (2 * i / HEAD_DIM)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_scaling_is_found_from_its_factors(tmp_path: Path):
    scaling = {"rope_type": "llama3", "factor": 32.0, **LLAMA3_ROPE}
    factors = llama3_factors(500000.0, 32.0)
    assert any(1 < factor < 32 for factor in factors)
    settings = {"rope.freq_base": 500000.0}
    checkpoint = make(tmp_path, "llama", settings, stored={"rope_freqs.weight": factors})
    assert checkpoint.config["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in checkpoint.tensors
    with pytest.raises(CheckpointError, match="rotary factors other than Llama 3's"):
        make(tmp_path, "llama", settings, stored={"rope_freqs.weight": factors * 2})


def test_other_scalings(tmp_path: Path):
    linear = make(tmp_path, "llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert linear.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 128,
    }
    assert make(tmp_path, "qwen2", yarn).config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }


def test_phi3_has_its_factors_in_tensors(tmp_path: Path):
    long, short = np.arange(1, 7, dtype=np.float32), np.ones(6, np.float32)
    checkpoint = make(
        tmp_path,
        "phi3",
        {
            "rope.dimension_count": 12,
            "rope.scaling.original_context_length": 64,
            "attention.sliding_window": 100,
        },
        stored={"rope_factors_long.weight": long, "rope_factors_short.weight": short},
    )
    config = checkpoint.config
    assert config["rope_scaling"]["type"] == "longrope"
    assert config["rope_scaling"]["long_factor"] == long.tolist()
    assert config["rope_scaling"]["short_factor"] == short.tolist()
    assert (config["partial_rotary_factor"], config["original_max_position_embeddings"]) == (0.75, 64)
    assert config["sliding_window"] == 100
    assert not any("rope" in name for name in checkpoint.tensors)


def test_gemma_layers_alternate(tmp_path: Path):
    two = make(tmp_path, "gemma2", {"attention.sliding_window": 8, "attn_logit_softcapping": 20.0}).config
    assert two["layer_types"] == ["sliding_attention", "full_attention"]
    assert (two["attn_logit_softcapping"], two["final_logit_softcapping"]) == (20.0, 30.0)
    assert (two["query_pre_attn_scalar"], two["sliding_window"]) == (HEAD_DIM, 8)
    three = make(tmp_path, "gemma3", {"attention.sliding_window": 8}).config
    assert (
        three["layer_types"] == ["sliding_attention"] * 2
    )  # the sixth would be the first that sees everything
    assert (three["rope_theta"], three["rope_local_base_freq"]) == (1e6, 1e4)


def test_olmo3_is_not_taken_for_olmo2(tmp_path: Path):
    config = make(tmp_path, "olmo2", {"attention.sliding_window": 8}).config
    assert config["architectures"] == ["Olmo3ForCausalLM"]


def test_generation_defaults(tmp_path: Path):
    stored = {
        "ggml.tokens": ["a"] * VOCAB,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.eot_token_id": 5,
        "ggml.padding_token_id": 7,
    }
    path = make(tmp_path, "llama", tokenizer=stored).path
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 5]}
    assert checkpoint.config["pad_token_id"] == 7


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.F32, np.float32),
        (Kind.F16, np.float16),
        (Kind.BF16, ml_dtypes.bfloat16),
        (Kind.Q4_0, ml_dtypes.bfloat16),
    ],
    ids=str,
)
def test_the_dtype_of_auto(kind: Kind, dtype: Any, tmp_path: Path):
    assert open_checkpoint(str(gguf_made.write_llama(tmp_path / "m.gguf", kind=kind))).dtype == dtype


def test_gemma_norms_are_exact_in_bfloat16(tmp_path: Path):
    """1.004 is 1 in bfloat16: the one must go before the cast."""
    name = "model.layers.0.input_layernorm.weight"
    checkpoint = make(
        tmp_path, "gemma2", stored={"blk.0.attn_norm.weight": np.full(HIDDEN, 1.004, np.float32)}
    )
    read = checkpoint.read(name, np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_allclose(read.astype(np.float32), 0.004, rtol=0.01)


def test_unknown_tensors_keep_their_names(tmp_path: Path):
    checkpoint = make(tmp_path, "llama", stored={"blk.0.mystery.weight": np.ones(4, np.float32)})
    assert "blk.0.mystery.weight" in checkpoint.tensors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_count": 3}, "says it has 3 layers, but has tensors of 2"),
        ({"block_count": 0}, "llama.block_count=0: must be at least 1"),
        ({"block_count": "two"}, "llama.block_count is a str"),
        ({"attention.head_count": True}, "llama.attention.head_count is a bool"),
        ({"attention.head_count_kv": [1, 2]}, "llama.attention.head_count_kv is a list"),
        ({"rope.freq_base": float("nan")}, "llama.rope.freq_base=nan: must be finite"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, "llama", settings)


def test_heads_that_do_not_fit_the_tensor(tmp_path: Path):
    checkpoint = make(tmp_path, "llama", {"attention.head_count": 7})
    with pytest.raises(CheckpointError, match=r"tensor 'blk\.0\.attn_q\.weight' of shape \[64, 64\]"):
        checkpoint.read("model.layers.0.self_attn.q_proj.weight")


def test_an_architecture_that_is_not_read(tmp_path: Path):
    gguf_made.write(tmp_path / "m.gguf", "mamba", {"token_embd.weight": (np.ones((4, 4)), Kind.F32)})
    with pytest.raises(CheckpointError, match="'mamba' is not read; read are llama, smollm3, qwen2"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_the_names_are_those_of_the_package():
    for architecture, names in ARCHITECTURES.items():
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        known = gguf.get_tensor_name_map(arch, 4)
        for stored, name in names.tensors.items():
            assert known.get_name(name.format(3)) == stored.format(3), (architecture, stored)


def test_views_outlive_the_checkpoint(tmp_path: Path):
    checkpoint = make(tmp_path, "qwen3")
    view = checkpoint.read("model.embed_tokens.weight")
    before = view.copy()
    checkpoint.close()
    checkpoint.close()
    np.testing.assert_array_equal(view, before)
