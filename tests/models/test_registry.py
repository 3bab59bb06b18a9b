"""Who serves which architecture."""

import pytest

from jaxllm.models import CausalLM, ModelRegistry
from jaxllm.models.llama import Llama

FAMILIES = [
    *("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM"),
    *("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "GptOssForCausalLM", "LlamaForCausalLM"),
    *("MistralForCausalLM", "MixtralForCausalLM", "Olmo2ForCausalLM", "OlmoeForCausalLM"),
    *("Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM"),
    *("Qwen3MoeForCausalLM", "SmolLM3ForCausalLM"),
]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> type[ModelRegistry]:
    monkeypatch.setattr(ModelRegistry, "_models", dict(ModelRegistry._models))
    return ModelRegistry


def test_all_families_are_there(registry: type[ModelRegistry]) -> None:
    assert registry.get_supported_archs() == FAMILIES
    for name in FAMILIES:
        assert issubclass(registry.resolve({"architectures": [name]}), CausalLM)


def test_unknown_architecture_is_told_what_there_is(registry: type[ModelRegistry]) -> None:
    with pytest.raises(ValueError, match=r"'BertModel'.*GPT2LMHeadModel, .*SmolLM3ForCausalLM.*register"):
        registry.resolve({"architectures": ["BertModel"]})
    with pytest.raises(ValueError, match=r"architectures=\[\]"):
        registry.resolve({})


def test_anybody_can_register(registry: type[ModelRegistry]) -> None:
    class Mine(Llama):
        pass

    registry.register("MyForCausalLM", Mine)
    registry.register("LazyForCausalLM", "jaxllm.models.llama:Llama")
    assert registry.resolve({"architectures": ["Other", "MyForCausalLM"]}) is Mine
    assert registry.resolve({"architectures": ["LazyForCausalLM"]}) is Llama


@pytest.mark.parametrize("model", [int, "llama.Llama", None])
def test_only_models_can_be_registered(registry: type[ModelRegistry], model: object) -> None:
    with pytest.raises(TypeError, match="CausalLM"):
        registry.register("MyForCausalLM", model)  # pyright: ignore[reportArgumentType]
