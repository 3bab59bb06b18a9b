"""Frequencies of rotary embeddings, and the ways checkpoints stretch them to longer contexts."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxllm.layers.rope import Rope


class _Context(NamedTuple):
    """What the frequencies depend on besides the parameters."""

    base: float
    dims: int
    """Dimensions of a head that are rotated."""
    max_position_embeddings: int
    max_model_len: int
    original: int
    """Positions that the model was first trained on."""

    @property
    def frequencies(self) -> NDArray[np.float64]:
        """Unscaled, one for each pair of dimensions."""
        return self.base ** -(np.arange(0, self.dims, 2) / self.dims)


_Scaling = Callable[[Mapping[str, Any], _Context], tuple[NDArray[np.float64], float]]


def read_rope(
    parameters: Mapping[str, Any], head_dim: int, max_position_embeddings: int, max_model_len: int
) -> Rope:
    """The rotary embedding of a config's `rope_parameters`, as transformers' `modeling_rope_utils` has it.

    Args:
        parameters: with `rope_theta`, and `rope_type` ("type" in old configs) and what that needs.
        max_model_len: the most tokens a sequence will have.

    Raises:
        ValueError: a type or a field that is not supported, or a field that the type needs and is missing.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _SCALINGS:
        raise ValueError(f"rope_type={kind!r}: not supported; supported are {', '.join(_SCALINGS)}")
    unknown = [name for name in parameters if name not in _KNOWN]
    if unknown:
        raise ValueError(f"rope_parameters: {unknown[0]!r} is not supported with rope_type={kind!r}")
    dims = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    if dims < 2 or dims % 2 or dims > head_dim:
        raise ValueError(
            f"partial_rotary_factor: leaves {dims} of {head_dim} dimensions, must be an even number"
        )
    original = parameters.get("original_max_position_embeddings") or max_position_embeddings
    context = _Context(
        float(parameters["rope_theta"]), dims, max_position_embeddings, max_model_len, original
    )
    frequencies, magnitude = _SCALINGS[kind](parameters, context)
    return Rope(tuple(frequencies.astype(np.float32).tolist()), magnitude)


def _need(parameters: Mapping[str, Any], name: str) -> Any:
    value = parameters.get(name)
    if value is None:
        kind = parameters.get("rope_type") or parameters.get("type")
        raise ValueError(f"rope_parameters: {name} is missing, which rope_type={kind!r} needs")
    return value


def _default(parameters: Mapping[str, Any], context: _Context) -> tuple[NDArray[np.float64], float]:
    return context.frequencies, 1.0


def _linear(parameters: Mapping[str, Any], context: _Context) -> tuple[NDArray[np.float64], float]:
    """All positions closer together (https://arxiv.org/abs/2306.15595)."""
    return context.frequencies / _need(parameters, "factor"), 1.0


def _dynamic(parameters: Mapping[str, Any], context: _Context) -> tuple[NDArray[np.float64], float]:
    """Frequencies that change once a sequence is longer than `max_position_embeddings`, which none is here.

    Keys in the cache would have to turn with them; transformers leaves those as they were.
    """
    if context.max_model_len > context.max_position_embeddings:
        raise ValueError(
            f"max_model_len={context.max_model_len}: rope_type='dynamic' is supported up to "
            f"max_position_embeddings={context.max_position_embeddings}"
        )
    return context.frequencies, 1.0


def _llama3(parameters: Mapping[str, Any], context: _Context) -> tuple[NDArray[np.float64], float]:
    """Long waves divided by the factor, short ones kept, those between blended (Llama 3.1)."""
    factor = _need(parameters, "factor")
    low, high = _need(parameters, "low_freq_factor"), _need(parameters, "high_freq_factor")
    turns = context.original * context.frequencies / (2 * math.pi)  # of each wave in the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return context.frequencies * ((1 - kept) / factor + kept), 1.0


def _yarn(parameters: Mapping[str, Any], context: _Context) -> tuple[NDArray[np.float64], float]:
    """https://arxiv.org/abs/2309.00071"""
    if parameters.get("short_factor") is not None:
        raise ValueError("rope_type='yarn': short_factor belongs to LongRoPE, whose rope_type is 'longrope'")
    factor = parameters.get("factor") or context.max_position_embeddings / context.original

    def dimension(turns: float) -> float:
        """Which pair of dimensions makes that many turns in the original context."""
        wave = context.original / (turns * 2 * math.pi)
        return context.dims * math.log(wave) / (2 * math.log(context.base))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, context.dims - 1)
    span = high - low if high != low else 0.001
    stretched = np.clip((np.arange(context.dims // 2) - low) / span, 0.0, 1.0)
    frequencies = context.frequencies * (stretched / factor + 1 - stretched)
    return frequencies, _yarn_magnitude(parameters, factor)


def yarn_scale(factor: float, weight: float) -> float:
    """By how much attention is sharpened for a context that is stretched by `factor`."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_magnitude(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        whole, kept_out = parameters["mscale"], parameters["mscale_all_dim"]
        return yarn_scale(factor, whole) / yarn_scale(factor, kept_out)
    return yarn_scale(factor, 1.0)


def _longrope(parameters: Mapping[str, Any], context: _Context) -> tuple[NDArray[np.float64], float]:
    """https://arxiv.org/abs/2402.13753, one set of factors for all sequences of an engine.

    transformers takes the long factors once a sequence outgrows the original context, and its cached keys
    stay turned by the short ones. Here sequences share pages, so what decides is how long they may get.
    """
    which = "long_factor" if context.max_model_len > context.original else "short_factor"
    factors = np.asarray(_need(parameters, which), np.float64)
    if factors.shape != context.frequencies.shape:
        raise ValueError(
            f"rope_parameters: {which} must have {context.dims // 2} entries, has {factors.size}"
        )
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        factor = parameters.get("factor") or context.max_position_embeddings / context.original
        magnitude = math.sqrt(1 + math.log(factor) / math.log(context.original)) if factor > 1 else 1.0
    return context.frequencies / factors, float(magnitude)


_SCALINGS: dict[str, _Scaling] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # LongRoPE's name in the first Phi-3 checkpoints
}

_KNOWN = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    *("factor", "attention_factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "finetuned",  # a remark in YaRN checkpoints
}
