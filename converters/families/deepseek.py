"""DeepSeek-V2 and V3: latents for queries, keys and values; experts as Qwen names them."""

from converters import latent
from converters.families.experts import EXPERTS, shared_expert
from converters.families.llama import ENDS, IGNORED, MLP, NORMS
from converters.rules import Rule, Table, transposed, unchanged

_ATTENTION = "model.layers.{}.self_attn"
_OURS = "layers.{}.attention"

_QUERIES = (
    Rule(f"{_OURS}.query_latent.weight", (f"{_ATTENTION}.q_a_proj.weight",), transposed),
    Rule(f"{_OURS}.query_latent.bias", (f"{_ATTENTION}.q_a_proj.bias",), unchanged),
    Rule(f"{_OURS}.query_norm.weight", (f"{_ATTENTION}.q_a_layernorm.weight",), unchanged),
    Rule(f"{_OURS}.query.weight", (f"{_ATTENTION}.q_b_proj.weight",), latent.queries),
    # Small models make queries of the hidden state.
    Rule(f"{_OURS}.query.weight", (f"{_ATTENTION}.q_proj.weight",), latent.queries),
)
_LATENTS = (
    Rule(f"{_OURS}.latent.weight", (f"{_ATTENTION}.kv_a_proj_with_mqa.weight",), latent.latents),
    Rule(f"{_OURS}.latent.bias", (f"{_ATTENTION}.kv_a_proj_with_mqa.bias",), latent.latents),
    Rule(f"{_OURS}.latent_norm.weight", (f"{_ATTENTION}.kv_a_layernorm.weight",), unchanged),
    Rule(f"{_OURS}.key.weight", (f"{_ATTENTION}.kv_b_proj.weight",), latent.keys),
    Rule(f"{_OURS}.value.weight", (f"{_ATTENTION}.kv_b_proj.weight",), latent.values),
    Rule(f"{_OURS}.output.weight", (f"{_ATTENTION}.o_proj.weight",), latent.output),
    Rule(f"{_OURS}.output.bias", (f"{_ATTENTION}.o_proj.bias",), unchanged),
)
_CORRECTION = Rule(
    "layers.{}.mlp.router.correction", ("model.layers.{}.mlp.gate.e_score_correction_bias",), unchanged
)

DEEPSEEK = Table(
    (*ENDS, *NORMS, *_QUERIES, *_LATENTS, *MLP, *EXPERTS, *shared_expert("shared_experts"), _CORRECTION),
    IGNORED,
    extra_layers=True,  # V3's last one predicts the token after the next
)
