"""Families with experts that keep Llama's names: Qwen2-MoE, Qwen3-MoE, OLMoE."""

from converters.families.llama import ATTENTION, ENDS, HEAD_NORMS, IGNORED, MLP, NORMS
from converters.families.olmo import TOKEN_NORMS
from converters.rules import EachExpert, Rule, Table, gate_up, one_output, transposed

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

# All experts in one tensor, as llama.cpp keeps them.
MERGED_EXPERTS = (
    Rule(
        "layers.{}.mlp.experts.gate_up.weight",
        (f"{_BLOCK}.experts.gate_proj.weight", f"{_BLOCK}.experts.up_proj.weight"),
        gate_up,
    ),
    Rule("layers.{}.mlp.experts.down.weight", (f"{_BLOCK}.experts.down_proj.weight",), transposed),
)


def shared_expert(name: str) -> tuple[Rule, ...]:
    """The expert that all tokens go through, under the family's name for it."""
    block = f"{_BLOCK}.{name}"
    sources = (f"{block}.gate_proj.weight", f"{block}.up_proj.weight")
    return (
        Rule("layers.{}.mlp.shared.gate_up.weight", sources, gate_up),
        Rule("layers.{}.mlp.shared.down.weight", (f"{block}.down_proj.weight",), transposed),
    )


_SHARED = (
    *shared_expert("shared_expert"),
    Rule("layers.{}.mlp.shared_gate.weight", (f"{_BLOCK}.shared_expert_gate.weight",), one_output),
)

QWEN_MOE = Table(
    (*ENDS, *NORMS, *ATTENTION, *HEAD_NORMS, *MLP, *EXPERTS, *MERGED_EXPERTS, *_SHARED),
    IGNORED,
)

OLMOE = Table((*ENDS, *NORMS, *ATTENTION, *TOKEN_NORMS, *EXPERTS, *MERGED_EXPERTS), IGNORED)
