"""Which class serves which architecture."""

import importlib
from collections.abc import Mapping
from typing import Any

from jaxllm.models.base import CausalLM


class ModelRegistry:
    """Architectures by the names that Hugging Face configs give them; there is one registry, the class."""

    _models: dict[str, type[CausalLM] | str] = {}  # noqa: RUF012

    @classmethod
    def register(cls, architecture: str, model: type[CausalLM] | str) -> None:
        """Makes `model` serve checkpoints of that architecture, in place of what did before.

        Args:
            architecture: as in a config's `architectures`, for example "LlamaForCausalLM".
            model: the class, or "module:Class" to import it when it is first needed.

        Raises:
            TypeError: neither a `CausalLM` class nor a string of that form.
        """
        is_class = isinstance(model, type) and issubclass(model, CausalLM)
        if not is_class and not (isinstance(model, str) and model.count(":") == 1):
            raise TypeError(f'model={model!r}: must be a subclass of CausalLM or a string "module:Class"')
        cls._models[architecture] = model

    @classmethod
    def get_supported_archs(cls) -> list[str]:
        """The names that `resolve` knows, sorted."""
        return sorted(cls._models)

    @classmethod
    def resolve(cls, hf: Mapping[str, Any]) -> type[CausalLM]:
        """The class that serves a Hugging Face config.

        Raises:
            ValueError: it names no architecture that is registered; the message lists those that are.
        """
        names = hf.get("architectures") or []
        for name in names:
            if name in cls._models:
                return cls._load(name)
        raise ValueError(
            f"architectures={list(names)!r}: none of them is supported; supported are "
            f"{', '.join(cls.get_supported_archs())}. Others can be added with ModelRegistry.register"
        )

    @classmethod
    def _load(cls, name: str) -> type[CausalLM]:
        model = cls._models[name]
        if not isinstance(model, str):
            return model
        module, _, attribute = model.partition(":")
        return getattr(importlib.import_module(module), attribute)


for _architecture, _model in {
    "DeepseekV2ForCausalLM": "deepseek:DeepseekV2",
    "DeepseekV3ForCausalLM": "deepseek:DeepseekV3",
    "GPT2LMHeadModel": "gpt2:GPT2",
    "Gemma2ForCausalLM": "gemma:Gemma2",
    "Gemma3ForCausalLM": "gemma:Gemma3",
    "Gemma3ForConditionalGeneration": "gemma:Gemma3Multimodal",
    "GptOssForCausalLM": "gpt_oss:GptOss",
    "LlamaForCausalLM": "llama:Llama",
    "MistralForCausalLM": "mistral:Mistral",
    "MixtralForCausalLM": "mixtral:Mixtral",
    "Olmo2ForCausalLM": "olmo:Olmo2",
    "OlmoeForCausalLM": "olmoe:Olmoe",
    "Phi3ForCausalLM": "phi:Phi3",
    "Qwen2ForCausalLM": "qwen:Qwen2",
    "Qwen2MoeForCausalLM": "qwen_moe:Qwen2Moe",
    "Qwen3ForCausalLM": "qwen:Qwen3",
    "Qwen3MoeForCausalLM": "qwen_moe:Qwen3Moe",
    "SmolLM3ForCausalLM": "smollm:SmolLM3",
}.items():
    ModelRegistry.register(_architecture, f"jaxllm.models.{_model}")
