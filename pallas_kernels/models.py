"""Sizes of models that ops are timed with, from their configs on Hugging Face."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """A mixture: how many there are, how many each token has, and their intermediate size."""

    count: int
    per_token: int
    intermediate: int


@dataclass(frozen=True)
class ModelShape:
    """One layer of a model, or of one device's part of it."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    sliding_window: int | None = None
    experts: Experts | None = None


MODELS = {
    "smollm2-135m": ModelShape(9, 3, 64, 576, 1536),
    "llama-3-8b": ModelShape(32, 8, 128, 4096, 14336),
    "qwen3-32b-tp4": ModelShape(16, 2, 128, 5120, 25600 // 4),
    "gemma-3-4b-local": ModelShape(8, 4, 256, 2560, 10240, sliding_window=1024),
    "mixtral-8x7b": ModelShape(32, 8, 128, 4096, 14336, experts=Experts(8, 2, 14336)),
    "qwen3-30b-a3b": ModelShape(32, 4, 128, 2048, 6144, experts=Experts(128, 8, 768)),
    "small-moe": ModelShape(4, 2, 64, 256, 512, experts=Experts(8, 2, 512)),
}
"""By name: "-tp4" is a quarter of it, "-local" its layers with a sliding window, "small-moe" nobody's."""


def get_model(name: str) -> ModelShape:
    """The sizes of that model.

    Raises:
        ValueError: it is not in `MODELS`; the message lists those that are.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r}: there are no sizes of it; there are those of {', '.join(MODELS)}")
    return MODELS[name]
