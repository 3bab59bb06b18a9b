"""A model and steps to plan with."""

import jax.numpy as jnp

from jaxllm.models.base import DecoderConfig
from jaxllm.models.llama import Llama
from jaxllm.plan.step import Step
from pallas_kernels.targets.compiled import Traffic

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA: DecoderConfig = Llama.read_config(
    CONFIG | {"num_hidden_layers": 12}, dtype=jnp.bfloat16, tensor_parallel_size=1
)

SMALL = (
    "--input-len", "32", "--output-len", "8", "--max-num-seqs", "4", "--max-num-batched-tokens", "16",
    "--no-progress",
)  # fmt: skip
"""Flags for quick plans."""


def step(tokens: int, *, flops: float = 0.0, nbytes: float = 0.0, layers: int = 0) -> Step:
    """A step as a compiler might have made it."""
    collectives = {"all-reduce": Traffic(1 + 2 * layers, 100 * (1 + 2 * layers))} if layers else {}
    return Step(tokens, flops, nbytes, 0, collectives, 0, 0, 0, 1.0)
