"""The cases' models in transformers: random weights, and logits of a greedy continuation. Needs torch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from family_cases import DECODE_STEPS, PROMPT_LENGTHS, Case


def make_model(case: Case, seed: int) -> Any:
    """The case's model in float32, with random weights that bfloat16 holds exactly."""
    cls = getattr(transformers, case.architecture)
    config = cls.config_class(**case.config)
    config.architectures = [case.architecture]
    model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    # DeepSeek-V3's is no parameter, but part of the checkpoint.
    corrections = [one for one in model.named_buffers() if one[0].endswith("correction_bias")]
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *corrections]:
            values = torch.randn(weight.shape, generator=generator) * _scale(name, weight)
            around_zero = weight.ndim > 1 or name.endswith(("bias", "sinks")) or "gemma" in config.model_type
            centre = 0.0 if around_zero else 1.0
            weight.copy_((values + centre).bfloat16().float())
    return model


def _scale(name: str, weight: torch.Tensor) -> float:
    """Deviations at which attention has a pattern and no part of a layer drowns another."""
    if weight.ndim == 1:
        return 0.3
    if any(table in name for table in ("embed_tokens", "wte", "wpe")):
        return 0.35
    inputs_first = name.split(".")[-2].startswith("c_")
    return 1.5 * weight.shape[0 if inputs_first else -1] ** -0.5


def make_prompts(vocab_size: int, seed: int) -> list[np.ndarray]:
    """Token ids of the prompts, different for each seed."""
    random = np.random.RandomState(seed)
    return [random.randint(3, vocab_size, size=length).astype(np.int32) for length in PROMPT_LENGTHS]


def continue_greedily(model: Any, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the prompt and of each greedy token, `[len(prompt) + DECODE_STEPS, vocab]`, and these tokens.

    Every step runs the whole sequence, so that nothing depends on transformers' cache.
    """
    tokens = prompt.tolist()
    for _ in range(DECODE_STEPS):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
        tokens.append(int(logits[-1].argmax()))
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.numpy(), np.array(tokens[len(prompt) :], np.int32)


def save_checkpoint(model: Any, folder: Path) -> None:
    """As transformers writes it: config.json and model.safetensors, weights in bfloat16.

    Nothing may run the model after this: its rotary frequencies are rounded too.
    """
    model.to(torch.bfloat16).save_pretrained(folder)
