"""gpt-oss: Llama's names for attention, and all experts in one tensor, inputs first."""

from converters.families.llama import ATTENTION, ENDS, IGNORED, NORMS
from converters.rules import Rule, Table, stacked_expert_gate_up, transposed, unchanged

_LAYER = "model.layers.{}"
_EXPERTS = f"{_LAYER}.mlp.experts"

_SINKS = Rule("layers.{}.attention.sinks", (f"{_LAYER}.self_attn.sinks",), unchanged)
_ROUTER = (
    Rule("layers.{}.mlp.router.weight", (f"{_LAYER}.mlp.router.weight",), transposed),
    Rule("layers.{}.mlp.router.bias", (f"{_LAYER}.mlp.router.bias",), unchanged),
)
_GATE_UP = (
    Rule("layers.{}.mlp.experts.gate_up.weight", (f"{_EXPERTS}.gate_up_proj",), stacked_expert_gate_up),
    Rule("layers.{}.mlp.experts.gate_up.bias", (f"{_EXPERTS}.gate_up_proj_bias",), stacked_expert_gate_up),
)
_DOWN = (
    Rule("layers.{}.mlp.experts.down.weight", (f"{_EXPERTS}.down_proj",), unchanged),
    Rule("layers.{}.mlp.experts.down.bias", (f"{_EXPERTS}.down_proj_bias",), unchanged),
)

GPT_OSS = Table((*ENDS, *NORMS, *ATTENTION, _SINKS, *_ROUTER, *_GATE_UP, *_DOWN), IGNORED)
