"""Families with experts that keep Llama's names: Qwen2-MoE, Qwen3-MoE, OLMoE."""

from converters.families.llama import ATTENTION, ENDS, HEAD_NORMS, IGNORED, MLP, NORMS
from converters.rules import EachExpert, Rule, Table, gate_up, key_norm, query_norm, transposed

_ATTENTION = "model.layers.{}.self_attn"
_BLOCK = "model.layers.{}.mlp"
_EXPERT = f"{_BLOCK}.experts.*"

EXPERTS = (
    Rule("layers.{}.mlp.router.weight", (f"{_BLOCK}.gate.weight",), transposed),
    Rule(
        "layers.{}.mlp.experts.gate_up.weight",
        (f"{_EXPERT}.gate_proj.weight", f"{_EXPERT}.up_proj.weight"),
        EachExpert(gate_up, sources=2),
    ),
    Rule("layers.{}.mlp.experts.down.weight", (f"{_EXPERT}.down_proj.weight",), EachExpert(transposed)),
)


def shared_expert(name: str) -> tuple[Rule, ...]:
    """The expert that all tokens go through, under the family's name for it."""
    block = f"{_BLOCK}.{name}"
    sources = (f"{block}.gate_proj.weight", f"{block}.up_proj.weight")
    return (
        Rule("layers.{}.mlp.shared.gate_up.weight", sources, gate_up),
        Rule("layers.{}.mlp.shared.down.weight", (f"{block}.down_proj.weight",), transposed),
    )


_SHARED_GATE = Rule("layers.{}.mlp.shared_gate.weight", (f"{_BLOCK}.shared_expert_gate.weight",), transposed)

QWEN_MOE = Table(
    (*ENDS, *NORMS, *ATTENTION, *HEAD_NORMS, *MLP, *EXPERTS, *shared_expert("shared_expert"), _SHARED_GATE),
    IGNORED,
)

# As in OLMo 2, queries and keys are normalized over all heads at once.
_ALL_HEADS = (
    Rule("layers.{}.attention.query_norm.weight", (f"{_ATTENTION}.q_norm.weight",), query_norm),
    Rule("layers.{}.attention.key_norm.weight", (f"{_ATTENTION}.k_norm.weight",), key_norm),
)

OLMOE = Table((*ENDS, *NORMS, *ATTENTION, *_ALL_HEADS, *EXPERTS), IGNORED)
