"""GPT-2: linear layers kept as `[in, out]`, biases everywhere, learned positions."""

from converters.rules import (
    Rule,
    Table,
    conv_output,
    conv_stacked_qkv,
    stacked_qkv_bias,
    unchanged,
    vocabulary,
)

_LAYER = "transformer.h.{}"


def _affine(target: str, source: str) -> tuple[Rule, ...]:
    """A weight and a bias that stay as they are."""
    return tuple(Rule(f"{target}.{part}", (f"{source}.{part}",), unchanged) for part in ("weight", "bias"))


_ATTENTION = (
    Rule("layers.{}.attention.qkv.weight", (f"{_LAYER}.attn.c_attn.weight",), conv_stacked_qkv),
    Rule("layers.{}.attention.qkv.bias", (f"{_LAYER}.attn.c_attn.bias",), stacked_qkv_bias),
    Rule("layers.{}.attention.output.weight", (f"{_LAYER}.attn.c_proj.weight",), conv_output),
    Rule("layers.{}.attention.output.bias", (f"{_LAYER}.attn.c_proj.bias",), unchanged),
)

GPT2 = Table(
    (
        Rule("embedding.weight", ("transformer.wte.weight",), vocabulary),
        Rule("head.weight", ("lm_head.weight",), vocabulary),
        Rule("positions.weight", ("transformer.wpe.weight",), unchanged),
        *_affine("norm", "transformer.ln_f"),
        *_affine("layers.{}.attention_norm", f"{_LAYER}.ln_1"),
        *_affine("layers.{}.mlp_norm", f"{_LAYER}.ln_2"),
        *_affine("layers.{}.mlp.up", f"{_LAYER}.mlp.c_fc"),
        *_affine("layers.{}.mlp.down", f"{_LAYER}.mlp.c_proj"),
        *_ATTENTION,
    ),
    # Causal masks that old checkpoints carry, and the copy of the embedding.
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", r"lm_head\.weight"),
    # OpenAI's own upload has no prefix.
    renames=(("transformer.", ""),),
)
