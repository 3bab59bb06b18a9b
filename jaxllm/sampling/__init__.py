"""Choosing tokens: what a request asks for, and the sampler that does it on the device."""

from jaxllm.sampling.logprobs import token_logprobs
from jaxllm.sampling.params import BeamSearchParams, RequestOutputKind, SamplingParams
from jaxllm.sampling.processors import (
    LogitsProcessor,
    register_logits_processor,
    registered_logits_processors,
)
from jaxllm.sampling.sampler import sample
from jaxllm.sampling.settings import row_settings
from jaxllm.sampling.state import Limits, RowSettings, SamplerConfig, SamplerState, empty_state, load_row

__all__ = [
    "BeamSearchParams",
    "Limits",
    "LogitsProcessor",
    "RequestOutputKind",
    "RowSettings",
    "SamplerConfig",
    "SamplerState",
    "SamplingParams",
    "empty_state",
    "load_row",
    "register_logits_processor",
    "registered_logits_processors",
    "row_settings",
    "sample",
    "token_logprobs",
]
