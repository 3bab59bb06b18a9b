"""OLMo 2: Llama's names, with norms after the parts of a layer and over all heads at once."""

from converters.families.llama import ATTENTION, ENDS, IGNORED, MLP
from converters.rules import Rule, Table, key_norm, query_norm, unchanged

_LAYER = "model.layers.{}"

# Norms over all of a token's queries, and all of its keys (OLMo 2, OLMoE).
TOKEN_NORMS = (
    Rule("layers.{}.attention.query_norm.weight", (f"{_LAYER}.self_attn.q_norm.weight",), query_norm),
    Rule("layers.{}.attention.key_norm.weight", (f"{_LAYER}.self_attn.k_norm.weight",), key_norm),
)

_NORMS = (
    Rule("layers.{}.attention_norm.weight", (f"{_LAYER}.post_attention_layernorm.weight",), unchanged),
    Rule("layers.{}.mlp_norm.weight", (f"{_LAYER}.post_feedforward_layernorm.weight",), unchanged),
)

OLMO2 = Table((*ENDS, *_NORMS, *ATTENTION, *TOKEN_NORMS, *MLP), IGNORED)
