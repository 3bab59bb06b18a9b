"""Gemma 2 and 3: Llama's names, with norms before and after the parts of a layer."""

from converters.families.llama import ATTENTION, ENDS, HEAD_NORMS, IGNORED, MLP
from converters.rules import Rule, Table, unchanged

_LAYER = "model.layers.{}"

_NORMS = (
    Rule("layers.{}.attention_norm.weight", (f"{_LAYER}.input_layernorm.weight",), unchanged),
    Rule("layers.{}.attended_norm.weight", (f"{_LAYER}.post_attention_layernorm.weight",), unchanged),
    Rule("layers.{}.mlp_norm.weight", (f"{_LAYER}.pre_feedforward_layernorm.weight",), unchanged),
    Rule("layers.{}.output_norm.weight", (f"{_LAYER}.post_feedforward_layernorm.weight",), unchanged),
)

GEMMA = Table((*ENDS, *_NORMS, *ATTENTION, *HEAD_NORMS, *MLP), IGNORED)

# The language model inside Gemma 3's checkpoints with a vision tower, as transformers 5 and 4 call it.
GEMMA3_MULTIMODAL = Table(
    GEMMA.rules,
    ignored=(*IGNORED, r"(.*\.)?lm_head\.weight", r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
    renames=(
        ("model.", "model.language_model."),
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
)
