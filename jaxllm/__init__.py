"""An inference engine for large language models that is JAX from the ground up.

    from jaxllm import Engine, SamplingParams

    with Engine.from_pretrained("smollm2-135m-instruct") as engine:
        print(engine.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text)

Names are imported when they are first used, so `import jaxllm` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "jaxllm.engine.async_engine",
    "BeamSearchOutput": "jaxllm.engine.beam_search",
    "BeamSearchParams": "jaxllm.sampling",
    "CompletionOutput": "jaxllm.engine.outputs",
    "Engine": "jaxllm.engine.engine",
    "EngineConfig": "jaxllm.config",
    "LLM": "jaxllm.engine.llm",
    "Logprob": "jaxllm.engine.outputs",
    "ModelRegistry": "jaxllm.models.registry",
    "PromptScore": "jaxllm.engine.scoring",
    "RequestOutput": "jaxllm.engine.outputs",
    "RequestOutputKind": "jaxllm.sampling",
    "SamplingParams": "jaxllm.sampling",
    "StructuredOutputsParams": "jaxllm.structured",
    "register_logits_processor": "jaxllm.sampling",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "Logprob",
    "ModelRegistry",
    "PromptScore",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "register_logits_processor",
]

if TYPE_CHECKING:
    from jaxllm.config import EngineConfig
    from jaxllm.engine.async_engine import AsyncEngine
    from jaxllm.engine.beam_search import BeamSearchOutput
    from jaxllm.engine.engine import Engine
    from jaxllm.engine.llm import LLM
    from jaxllm.engine.outputs import CompletionOutput, Logprob, RequestOutput
    from jaxllm.engine.scoring import PromptScore
    from jaxllm.models.registry import ModelRegistry
    from jaxllm.sampling import (
        BeamSearchParams,
        RequestOutputKind,
        SamplingParams,
        register_logits_processor,
    )
    from jaxllm.structured import StructuredOutputsParams


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
