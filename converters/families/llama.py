"""Llama, and the families that keep its tensor names: Mistral, Qwen, SmolLM3."""

from converters.rules import (
    Rule,
    Table,
    gate_up,
    gate_up_bias,
    output,
    qkv,
    qkv_bias,
    transposed,
    unchanged,
    vocabulary,
)

_ATTENTION = "model.layers.{}.self_attn"
_MLP = "model.layers.{}.mlp"

ATTENTION = (
    Rule("layers.{}.attention.qkv.weight", tuple(f"{_ATTENTION}.{p}_proj.weight" for p in "qkv"), qkv),
    Rule("layers.{}.attention.qkv.bias", tuple(f"{_ATTENTION}.{p}_proj.bias" for p in "qkv"), qkv_bias),
    Rule("layers.{}.attention.output.weight", (f"{_ATTENTION}.o_proj.weight",), output),
    Rule("layers.{}.attention.output.bias", (f"{_ATTENTION}.o_proj.bias",), unchanged),
)

MLP = (
    Rule("layers.{}.mlp.gate_up.weight", (f"{_MLP}.gate_proj.weight", f"{_MLP}.up_proj.weight"), gate_up),
    Rule("layers.{}.mlp.gate_up.bias", (f"{_MLP}.gate_proj.bias", f"{_MLP}.up_proj.bias"), gate_up_bias),
    Rule("layers.{}.mlp.down.weight", (f"{_MLP}.down_proj.weight",), transposed),
    Rule("layers.{}.mlp.down.bias", (f"{_MLP}.down_proj.bias",), unchanged),
)

ENDS = (
    Rule("embedding.weight", ("model.embed_tokens.weight",), vocabulary),
    Rule("norm.weight", ("model.norm.weight",), unchanged),
    Rule("head.weight", ("lm_head.weight",), vocabulary),
)

NORMS = (
    Rule("layers.{}.attention_norm.weight", ("model.layers.{}.input_layernorm.weight",), unchanged),
    Rule("layers.{}.mlp_norm.weight", ("model.layers.{}.post_attention_layernorm.weight",), unchanged),
)

# Norms of each head's query and key (Qwen3, Gemma 3).
HEAD_NORMS = (
    Rule("layers.{}.attention.query_norm.weight", (f"{_ATTENTION}.q_norm.weight",), unchanged),
    Rule("layers.{}.attention.key_norm.weight", (f"{_ATTENTION}.k_norm.weight",), unchanged),
)

# Rotary buffers that old checkpoints carry, and the copy of the embedding that some tied ones do.
IGNORED = (r".*\.rotary_emb\.inv_freq", r"lm_head\.weight")

LLAMA = Table((*ENDS, *NORMS, *ATTENTION, *HEAD_NORMS, *MLP), IGNORED)
