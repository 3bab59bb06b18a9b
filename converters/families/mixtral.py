"""Mixtral: Llama's names, and for each expert Meta's: w1 is the gate, w3 up, w2 down."""

from converters.families.llama import ATTENTION, ENDS, IGNORED, NORMS
from converters.rules import EachExpert, Rule, Table, gate_up, transposed

_BLOCK = "model.layers.{}.block_sparse_moe"
_EXPERT = f"{_BLOCK}.experts.*"

EXPERTS = (
    Rule("layers.{}.mlp.router.weight", (f"{_BLOCK}.gate.weight",), transposed),
    Rule(
        "layers.{}.mlp.experts.gate_up.weight",
        (f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight"),
        EachExpert(gate_up, sources=2),
    ),
    Rule("layers.{}.mlp.experts.down.weight", (f"{_EXPERT}.w2.weight",), EachExpert(transposed)),
)

MIXTRAL = Table((*ENDS, *NORMS, *ATTENTION, *EXPERTS), IGNORED)
