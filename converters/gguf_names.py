"""llama.cpp's tensor names as the ones transformers has, and what its converter changed in the tensors.

Source: `gguf.tensor_mapping` and llama.cpp's convert_hf_to_gguf.py. Every table here is data.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Undo = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]
"""Takes a tensor as the file has it and the model's config; gives the tensor that transformers has."""


def unpermute_queries(tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Rows of each head from llama.cpp's rotary pairs (0, h), (1, h + 1), ... side by side, to two halves."""
    return _unpermute(tensor, config["num_attention_heads"])


def unpermute_keys(tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """As `unpermute_queries`, for the key-value heads."""
    return _unpermute(tensor, config["num_key_value_heads"])


def _unpermute(tensor: np.ndarray, heads: int) -> np.ndarray:
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def minus_one(tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Gemma's norms: transformers adds the one when it runs, llama.cpp when it converts."""
    return tensor - np.float32(1)


def transpose(tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """GPT-2's projections: transformers keeps them as `[in, out]`."""
    return tensor.T


@dataclass(frozen=True)
class Names:
    """How one of llama.cpp's architectures names its tensors.

    Attributes:
        tensors: from llama.cpp's name to transformers', without `.weight` or `.bias`; `{}` is the layer.
        undo: what to do to a tensor on the way out, by its llama.cpp name.
        settings: tensors that are settings, and are read as such.
    """

    tensors: Mapping[str, str]
    undo: Mapping[str, Undo]
    settings: frozenset[str] = frozenset({"rope_freqs"})

    def resolve(self, name: str) -> tuple[str, Undo | None] | None:
        """The transformers name and what to undo, or None for a name that is not in the table."""
        stem, _, suffix = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d{1,6})\.(.+)", stem)
        general = f"blk.{{}}.{layer[2]}" if layer else stem
        if suffix not in ("weight", "bias") or general not in self.tensors:
            return None
        known = self.tensors[general].format(layer[1] if layer else "")
        return f"{known}.{suffix}", self.undo.get(general)


_TIED_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_ENDS = {**_TIED_ENDS, "output": "lm_head"}
_ATTENTION = {
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
}
_HEAD_NORMS = {
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
_MLP = {
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_EXPERTS = {
    "blk.{}.ffn_gate_inp": "model.layers.{}.mlp.gate",
    "blk.{}.ffn_gate_exps": "model.layers.{}.mlp.experts.gate_proj",
    "blk.{}.ffn_up_exps": "model.layers.{}.mlp.experts.up_proj",
    "blk.{}.ffn_down_exps": "model.layers.{}.mlp.experts.down_proj",
}
_SHARED_EXPERT = {
    "blk.{}.ffn_gate_inp_shexp": "model.layers.{}.mlp.shared_expert_gate",
    "blk.{}.ffn_gate_shexp": "model.layers.{}.mlp.shared_expert.gate_proj",
    "blk.{}.ffn_up_shexp": "model.layers.{}.mlp.shared_expert.up_proj",
    "blk.{}.ffn_down_shexp": "model.layers.{}.mlp.shared_expert.down_proj",
}
_PRE_NORMS = {
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
}
_POST_NORMS = {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GEMMA_NORMS = {
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    **_POST_NORMS,
}
_PERMUTED: dict[str, Undo] = {"blk.{}.attn_q": unpermute_queries, "blk.{}.attn_k": unpermute_keys}

SMOLLM3 = Names({**_ENDS, **_ATTENTION, **_MLP, **_PRE_NORMS}, _PERMUTED)
# Mixtral is a Llama with experts.
LLAMA = Names({**SMOLLM3.tensors, **_EXPERTS}, _PERMUTED)
QWEN2 = Names(SMOLLM3.tensors, {})
QWEN3 = Names({**QWEN2.tensors, **_HEAD_NORMS}, {})
_MIXTURE = {**_ENDS, **_ATTENTION, **_EXPERTS, **_PRE_NORMS}
QWEN2_MOE = Names({**_MIXTURE, **_SHARED_EXPERT}, {})
QWEN3_MOE = Names({**_MIXTURE, **_HEAD_NORMS}, {})
GEMMA2 = Names(
    {**_TIED_ENDS, **_ATTENTION, **_MLP, **_GEMMA_NORMS},
    dict.fromkeys(["output_norm", *_GEMMA_NORMS], minus_one),
)
GEMMA3 = Names(
    {**GEMMA2.tensors, **_HEAD_NORMS, "output": "lm_head"},
    {**GEMMA2.undo, **dict.fromkeys(_HEAD_NORMS, minus_one)},
)
OLMO2 = Names({**_ENDS, **_ATTENTION, **_MLP, **_POST_NORMS, **_HEAD_NORMS}, {})
PHI3 = Names(
    {
        **_ENDS,
        **_PRE_NORMS,
        "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
        "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
        "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj",
        "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
    },
    {},
    settings=frozenset({"rope_factors_long", "rope_factors_short"}),
)
GPT2 = Names(
    {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
        "blk.{}.attn_norm": "transformer.h.{}.ln_1",
        "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
        "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
        "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
        "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
        "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
    },
    dict.fromkeys(["blk.{}.attn_qkv", "blk.{}.attn_output", "blk.{}.ffn_up", "blk.{}.ffn_down"], transpose),
)

ARCHITECTURES: Mapping[str, Names] = {
    "llama": LLAMA,
    "smollm3": SMOLLM3,
    "qwen2": QWEN2,
    "qwen2moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3moe": QWEN3_MOE,
    "olmoe": QWEN3_MOE,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "gpt2": GPT2,
}
"""By `general.architecture`. Mistral's and Mixtral's models are written as `llama`."""
