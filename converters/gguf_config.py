"""A GGUF file's metadata as the `config.json` and `generation_config.json` that transformers would have.

Source: llama.cpp's convert_hf_to_gguf.py for what is written, and its src/models/*.cpp for what it leaves out
of the file and knows by heart (noted where it is used).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters.errors import CheckpointError
from converters.gguf_file import GGUFFile

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1 to 3.3 has; the file holds only the factors that follow from it, which are checked."""
_ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Metadata:
    """The keys of one architecture, with their types checked."""

    file: GGUFFile
    architecture: str

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """`{architecture}.{key}`, or the default if the file does not have it."""
        return self._checked(f"{self.architecture}.{key}", kind, default)

    def size(self, key: str, default: int | None = None) -> int:
        """A number of things, at least one; without a default the file must have it."""
        value = self.get(key, int, default)
        if value is None:
            raise CheckpointError(f"{self.file.path}: has no {self.architecture}.{key}")
        if value < 1:
            raise CheckpointError(f"{self.file.path}: {self.architecture}.{key}={value}: must be at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number of at least 0, rounded to the digits that float32 has: 1e-05 and not 9.99999974e-06."""
        value = self.get(key, (float, int), default)
        if value is None:
            return None
        if not 0 <= value < np.finfo(np.float32).max:
            raise CheckpointError(
                f"{self.file.path}: {self.architecture}.{key}={value}: must be finite, not negative"
            )
        return float(np.format_float_positional(np.float32(value), unique=True))

    def token(self, key: str) -> int | None:
        """A special token's id."""
        return self._checked(f"tokenizer.ggml.{key}_token_id", int, None)

    def _checked(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self.file.metadata.get(key, default)
        if value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
            return value
        raise CheckpointError(f"{self.file.path}: {key} is a {type(value).__name__}, which it should not be")

    def tensor(self, name: str) -> list[float] | None:
        """A short list of numbers that is kept as a tensor."""
        info = self.file.tensors.get(f"{name}.weight")
        if info is None:
            return None
        if len(info.shape) != 1 or info.shape[0] > 4096:
            raise CheckpointError(
                f"{self.file.path}: tensor '{name}.weight' has the shape {list(info.shape)}"
            )
        return self.file.read(f"{name}.weight", np.dtype(np.float32)).tolist()


def read_config(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The model's config, under the names of transformers' config class."""
    data = Metadata(file, architecture)
    layers = data.size("block_count")
    named = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if layers != len(named):
        raise CheckpointError(f"{file.path}: says it has {layers} layers, but has tensors of {len(named)}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing or not a matrix")
    config = _gpt2(data) if architecture == "gpt2" else _common(data)
    config |= _EXTRAS[architecture](data, config)
    tokens = {key: data.token(key) for key in ("bos", "eos")} | {"pad": data.token("padding")}
    return {
        "architectures": [_CLASSES[architecture][0]],
        "model_type": _CLASSES[architecture][1],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **config,
        **{f"{key}_token_id": token for key, token in tokens.items() if token is not None},
    }


def read_generation_config(file: GGUFFile) -> dict[str, Any]:
    """The tokens that end a text, and the sampling settings that newer files carry (`general.sampling.*`)."""
    data = Metadata(file, "general")
    ends = [token for key in ("eos", "eot", "eom") if (token := data.token(key)) is not None]
    config: dict[str, Any] = {}
    if ends:
        unique = list(dict.fromkeys(ends))
        config["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    if (bos := data.token("bos")) is not None:
        config["bos_token_id"] = bos
    settings = {
        "temp": "temperature",
        "top_p": "top_p",
        "min_p": "min_p",
        "penalty_repeat": "repetition_penalty",
    }
    for key, name in settings.items():
        if (value := data.number(f"sampling.{key}")) is not None:
            config[name] = value
    if (top_k := data.get("sampling.top_k", int)) is not None:
        config["top_k"] = top_k
    if {"temperature", "top_p", "top_k", "min_p"} & config.keys():
        config["do_sample"] = True
    return config


def _common(data: Metadata) -> dict[str, Any]:
    heads = data.size("attention.head_count")
    hidden = data.size("embedding_length")
    config = {
        "num_hidden_layers": data.size("block_count"),
        "hidden_size": hidden,
        "intermediate_size": data.size("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": data.size("attention.head_count_kv", heads),
        "head_dim": data.size("attention.key_length", hidden // heads),
        "max_position_embeddings": data.size("context_length"),
        "rms_norm_eps": data.number("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": data.number("rope.freq_base", 10000.0),
        "hidden_act": _ACTIVATIONS.get(data.architecture, "silu"),
    }
    if scaling := _rope_scaling(data, config):
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(data: Metadata, config: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = data.get("rope.scaling.type", str)
    factor = data.number("rope.scaling.factor") or data.number("rope.scale_linear")
    if kind in (None, "none", "linear") and factor not in (None, 1.0):
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = data.size("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if factors := data.tensor("rope_freqs"):
        return _llama3_scaling(data, factors, config)
    return None


def _llama3_scaling(data: Metadata, factors: list[float], config: Mapping[str, Any]) -> dict[str, Any]:
    """Finds the settings whose factors the file holds."""
    scaling = {"rope_type": "llama3", "factor": max(factors), **LLAMA3_ROPE}
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(len(factors)) / len(factors))
    original, low, high = (
        scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    with np.errstate(all="ignore"):  # of factors in a damaged file
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if 2 * len(factors) != config["head_dim"] or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(
            f"{data.file.path}: tensor 'rope_freqs.weight' holds rotary factors other than Llama 3's, "
            "which are not read; use the model's safetensors"
        )
    return scaling


def _gpt2(data: Metadata) -> dict[str, Any]:
    return {
        "n_layer": data.size("block_count"),
        "n_embd": data.size("embedding_length"),
        "n_inner": data.size("feed_forward_length"),
        "n_head": data.size("attention.head_count"),
        "n_positions": data.size("context_length"),
        "layer_norm_epsilon": data.number("attention.layer_norm_epsilon", 1e-5),
        "activation_function": "gelu_new",
    }


def _nothing(data: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _llama(data: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    if data.get("expert_count", int):
        return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"} | {
            "num_local_experts": data.size("expert_count"),
            "num_experts_per_tok": data.size("expert_used_count"),
        }
    biased = any(".attn_q.bias" in name for name in data.file.tensors)
    return {"attention_bias": biased, "mlp_bias": any(".ffn_up.bias" in name for name in data.file.tensors)}


def _experts(data: Metadata, normalized: bool) -> dict[str, Any]:
    """Whether the weights of a token's experts add up to one is as in src/models/*.cpp."""
    return {
        "num_experts": data.size("expert_count"),
        "num_experts_per_tok": data.size("expert_used_count"),
        "norm_topk_prob": normalized,
    }


def _qwen2moe(data: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return _experts(data, normalized=False) | {
        "moe_intermediate_size": data.size("expert_feed_forward_length"),
        "shared_expert_intermediate_size": data.size("expert_shared_feed_forward_length"),
    }


def _qwen3moe(data: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    size = data.size("expert_feed_forward_length")
    return _experts(data, normalized=True) | {"moe_intermediate_size": size}


def _olmoe(data: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return _experts(data, normalized=False)


def _smollm3(data: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return _llama(data, config) | {"no_rope_layer_interval": 4}  # as in src/models/smollm3.cpp


def _gemma2(data: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    return _gemma(data, config, largest=46, pattern=2) | {
        "attn_logit_softcapping": data.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": data.number("final_logit_softcapping", 30.0),
    }


def _gemma3(data: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    cap = data.number("final_logit_softcapping")
    return _gemma(data, config, largest=62, pattern=6) | {
        "rope_theta": data.number("rope.freq_base", 1e6),
        "rope_local_base_freq": data.number("rope.freq_base_swa", 10000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": cap or None,
    }


def _gemma(data: Metadata, config: Mapping[str, Any], *, largest: int, pattern: int) -> dict[str, Any]:
    """Not in the file: every `pattern`-th layer sees all, and the 27B models scale by another width."""
    layers, hidden, heads = (
        config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    pattern = data.size("attention.sliding_window_pattern", pattern)
    kinds = [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
    ]
    return {
        "hidden_activation": config["hidden_act"],
        "query_pre_attn_scalar": hidden // heads if layers == largest else config["head_dim"],
        "sliding_window": data.size("attention.sliding_window", 4096),
        "layer_types": kinds,
    }


def _phi3(data: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    window = data.get("attention.sliding_window", int)
    rotary = data.size("rope.dimension_count", config["head_dim"])
    extra: dict[str, Any] = {
        "sliding_window": window or None,
        "partial_rotary_factor": rotary / config["head_dim"],
        "original_max_position_embeddings": data.size(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
    }
    long, short = data.tensor("rope_factors_long"), data.tensor("rope_factors_short")
    if long and short:
        extra["rope_scaling"] = {"type": "longrope", "long_factor": long, "short_factor": short}
    return extra


def _olmo2(data: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp writes OLMo 3, which has sliding windows, under the same name."""
    if data.get("attention.sliding_window", int) is None:
        return {}
    return {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"}


_CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen2moe": ("Qwen2MoeForCausalLM", "qwen2_moe"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "olmoe": ("OlmoeForCausalLM", "olmoe"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "olmo2": ("Olmo2ForCausalLM", "olmo2"),
    "gpt2": ("GPT2LMHeadModel", "gpt2"),
}
_EXTRAS: dict[str, Callable[[Metadata, Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "smollm3": _smollm3,
    "qwen2": _nothing,
    "qwen2moe": _qwen2moe,
    "qwen3": _nothing,
    "qwen3moe": _qwen3moe,
    "olmoe": _olmoe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "gpt2": _nothing,
}
