"""Language models: one file a family, composed from layers."""

from jaxllm.models.abstract import Parameter, Structure, materialize, merge, split
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.models.registry import ModelRegistry

__all__ = [
    "CausalLM",
    "DecoderConfig",
    "ModelRegistry",
    "Parameter",
    "Structure",
    "materialize",
    "merge",
    "split",
]
