"""Engines on the small checkpoints that parity is tested on; programs are few and quick to compile."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxllm import Engine, SamplingParams

CHECKPOINTS = Path(__file__).parent.parent / "models" / "goldens"

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "page_size": 4,
    "num_pages": 200,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 32,
    "compilation_cache": False,  # the tests' own folder stays in force
    "compile_in_background": False,  # so that the same steps run in the same programs each time
    "progress": False,
}


def small_engine(model: str = "llama", **options: Any) -> Engine:
    """An engine on one of the parity cases."""
    return Engine.from_pretrained(str(CHECKPOINTS / model), **(OPTIONS | options))


def golden(model: str) -> dict[str, np.ndarray]:
    """The reference's prompts, tokens and logits of a parity case."""
    with np.load(CHECKPOINTS / model / "golden.npz") as file:
        return dict(file)


def greedy(max_tokens: int = 16, **params: Any) -> SamplingParams:
    """Greedy sampling without text."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **params)
