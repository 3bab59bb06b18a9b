"""Phi-3: Llama's names, with queries, keys and values in one tensor, and gate and up in another."""

from converters.families.llama import ATTENTION, ENDS, IGNORED, MLP, NORMS
from converters.rules import Rule, Table, stacked_gate_up, stacked_qkv

_OWN = (
    Rule("layers.{}.attention.qkv.weight", ("model.layers.{}.self_attn.qkv_proj.weight",), stacked_qkv),
    Rule("layers.{}.mlp.gate_up.weight", ("model.layers.{}.mlp.gate_up_proj.weight",), stacked_gate_up),
)
_TARGETS = {rule.target for rule in _OWN}

PHI3 = Table(
    (*_OWN, *(rule for rule in (*ENDS, *NORMS, *ATTENTION, *MLP) if rule.target not in _TARGETS)), IGNORED
)
