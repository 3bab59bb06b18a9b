"""vLLM's names: arguments are mapped, refused by name, or accepted with a warning; calls reach the engine."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from small import CHECKPOINTS, OPTIONS, golden, greedy

from jaxllm import LLM, BeamSearchParams, SamplingParams
from jaxllm.config import EngineConfig, option_fields
from jaxllm.engine.engine import Engine
from jaxllm.engine.vllm_options import COMBINED, MEANINGLESS, REFUSED, RENAMED, translate


class Recorder:
    """Stands for an engine, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> str:
            self.calls.append((name, arguments, options))
            return f"{name}'s result"

        return call


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()

    def from_pretrained(model: str, **options: Any) -> Recorder:
        EngineConfig.create(model, **options)
        recorder.calls.append(("from_pretrained", (model,), options))
        return recorder

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    return recorder


def test_arguments_are_mapped_to_our_own() -> None:
    given = {
        "tensor_parallel_size": 2,
        "dtype": "half",
        "max_model_len": 100,
        "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "trust_remote_code": True,
        "block_size": 32,
        "num_gpu_blocks_override": 9,
        "scheduling_policy": "priority",
        "hf_token": "secret",
        "download_dir": "/models",
        "max_num_seqs": None,
        "quantization": None,
        "cpu_offload_gb": 0.0,
        "pipeline_parallel_size": 2,
        "use_tqdm_on_load": False,
        "attention_backend": "xla",
    }
    translated = translate(given)
    assert translated == {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "dtype": "float16",
        "max_model_len": 100,
        "memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "trust_remote_code": True,
        "page_size": 32,
        "num_pages": 9,
        "policy": "priority",
        "token": "secret",
        "cache_dir": "/models",
        "progress": False,
        "attention_backend": "xla",
    }
    EngineConfig.create("model", **translated)


def test_expert_parallelism_takes_the_devices_of_tensor_parallelism() -> None:
    given = {"tensor_parallel_size": 4, "enable_expert_parallel": True}
    assert translate(given) == {"expert_parallel_size": 4}
    assert translate(given | {"enable_expert_parallel": False}) == {"tensor_parallel_size": 4}
    own = {"tensor_parallel_size": 2, "expert_parallel_size": 4}
    assert translate(own | {"enable_expert_parallel": True}) == own
    replicas = {"data_parallel_size": 2, "tensor_parallel_size": 4}
    assert translate(replicas) == replicas
    groups = {"data_parallel_size": 2, "data_parallel_experts": True, "expert_parallel_size": 4}
    assert translate(replicas | {"enable_expert_parallel": True}) == groups


def test_experts_are_balanced_as_vllm_is_told() -> None:
    assert translate({"enable_eplb": True, "num_redundant_experts": 8}) == {
        "enable_eplb": True,
        "num_redundant_experts": 8,
    }
    told = {"num_redundant_experts": 4, "step_interval": 50}
    expected = {"num_redundant_experts": 4, "eplb_step_interval": 50}
    for config in (told, SimpleNamespace(**told)):
        assert translate({"eplb_config": config}) == expected
    with pytest.warns(UserWarning, match=r"ignored: eplb_config\.window_size"):
        assert translate({"eplb_config": told | {"window_size": 9}}) == expected
    with pytest.raises(NotImplementedError, match="eplb_config: 'step' is not supported; give num_redundant"):
        translate({"eplb_config": {"step": 5}})
    with pytest.raises(NotImplementedError, match="eplb_config='5x': must be a JSON object"):
        translate({"eplb_config": "5x"})


def test_other_spellings_of_values() -> None:
    class Dtype:  # as torch writes its own
        def __str__(self) -> str:
            return "torch.bfloat16"

    assert translate({"dtype": Dtype(), "hf_token": True}) == {"dtype": "bfloat16"}
    assert translate({"dtype": "float"}) == {"dtype": "float32"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_available_is_refused_by_name_with_what_to_do(name: str) -> None:
    accepted, advice = REFUSED[name]
    for value in (None, *accepted):
        assert translate({name: value}) == {}
    with pytest.raises(NotImplementedError, match=f"{name}='something'") as refusal:
        translate({name: "something"})
    assert str(refusal.value).endswith(advice)


def test_what_means_nothing_here_is_accepted_with_one_warning() -> None:
    with pytest.warns(
        UserWarning, match="without meaning on JAX, and ignored: disable_log_stats, swap_space"
    ) as seen:
        assert translate({"swap_space": 4, "disable_log_stats": True, "seed": 3}) == {"seed": 3}
    assert len(seen) == 1


def test_what_nobody_knows_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(TypeError, match=r"unknown argument 'max_modellen'; did you mean .*max_model_len"):
        translate({"max_modellen": 5})


def test_every_argument_has_one_fate() -> None:
    own = {field.name for _, field in option_fields()}
    fates = [*RENAMED, *REFUSED, *COMBINED, *MEANINGLESS]
    assert len(fates) == len(set(fates))
    assert set(RENAMED.values()) <= own
    assert not own & set(fates)


def test_the_engine_is_made_with_the_arguments(engine: Recorder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLM("model", seed=None, gpu_memory_utilization=0.5, max_model_len=10)
    expected = {"seed": 0, "memory_utilization": 0.5, "max_model_len": 10}
    assert engine.calls == [("from_pretrained", ("model",), expected)]
    with pytest.warns(UserWarning, match="swap_space") as seen:
        LLM(model="model", swap_space=4)
    assert seen[0].filename == __file__


def test_generate(engine: Recorder) -> None:
    params = SamplingParams(max_tokens=3)
    llm = LLM("model")
    engine.calls.clear()
    result = llm.generate(["a", "b"], params, use_tqdm=False, priority=[1, 2])
    assert result == "generate's result"
    llm.generate("a", tokenization_kwargs={"truncate_prompt_tokens": 5})
    assert engine.calls == [
        ("generate", (["a", "b"], params), {"progress": False, "priority": [1, 2]}),
        ("generate", ("a", None), {"progress": True, "priority": 0, "truncate_prompt_tokens": 5}),
    ]
    with pytest.raises(NotImplementedError, match="lora_request"):
        llm.generate("a", lora_request="adapter")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"tokenization_kwargs: unknown 'padding'; known are truncate"):
        llm.generate("a", tokenization_kwargs={"padding": True})


def test_chat(engine: Recorder) -> None:
    llm = LLM("model", chat_template="{{ own }}")
    engine.calls.clear()
    messages = [{"role": "user", "content": "hi"}]
    llm.chat(messages, use_tqdm=False, tools=[{"type": "function"}], chat_template_kwargs={"x": 1})
    llm.chat(messages, chat_template="{{ other }}", add_generation_prompt=False, continue_final_message=True)
    (name, arguments, first), (_, _, second) = engine.calls
    assert (name, arguments) == ("chat", (messages, None))
    assert first == {
        "progress": False,
        "chat_template": "{{ own }}",
        "add_generation_prompt": True,
        "continue_final_message": False,
        "tools": [{"type": "function"}],
        "chat_template_kwargs": {"x": 1},
    }
    assert (second["chat_template"], second["continue_final_message"]) == ("{{ other }}", True)
    for name, value in (("chat_template_content_format", "openai"), ("mm_processor_kwargs", {"x": 1})):
        with pytest.raises(NotImplementedError, match=name):
            llm.chat(messages, **{name: value})  # pyright: ignore[reportArgumentType]


def test_beam_search(engine: Recorder) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    llm = LLM("model")
    engine.calls.clear()
    assert llm.beam_search(["a"], params) == "beam_search's result"
    llm.beam_search(["a"], params, use_tqdm=True)
    assert engine.calls == [
        ("beam_search", (["a"], params), {"progress": False}),
        ("beam_search", (["a"], params), {"progress": True}),
    ]
    for name in ("lora_request", "concurrency_limit"):
        with pytest.raises(NotImplementedError, match=f"{name}=5: not supported"):
            llm.beam_search(["a"], params, **{name: 5})  # pyright: ignore[reportArgumentType]


def test_defaults_without_the_models_own(engine: Recorder) -> None:
    llm = LLM("model", generation_config="vllm")
    llm.generate("a")
    assert engine.calls[-1][1] == ("a", SamplingParams())
    assert llm.get_default_sampling_params() == SamplingParams()
    with pytest.raises(NotImplementedError, match="generation_config='/folder'"):
        LLM("model", generation_config="/folder")


def test_the_rest_reaches_the_engine(engine: Recorder) -> None:
    llm = LLM("model")
    engine.calls.clear()
    llm.sleep(2)
    llm.wake_up()
    llm.reset_prefix_cache()
    llm.get_tokenizer()
    llm.get_metrics()
    with llm:
        pass
    assert [name for name, _, _ in engine.calls] == [
        "sleep",
        "wake_up",
        "reset_prefix_cache",
        "get_tokenizer",
        "get_metrics",
        "close",
    ]
    assert engine.calls[0][1] == (2,)
    with pytest.raises(NotImplementedError, match="tags"):
        llm.wake_up(tags=["weights"])


def test_a_model_runs() -> None:
    reference = golden("llama")
    options = OPTIONS | {
        "num_gpu_blocks_override": 50,
        "block_size": 4,
        "enforce_eager": True,
        "max_num_seqs": 2,
    }
    del options["num_pages"], options["page_size"]
    prompts = [reference[f"prompt{i}"].tolist() for i in range(2)]
    with LLM(str(CHECKPOINTS / "llama"), **options) as llm:
        outputs = llm.generate(prompts, greedy(16), use_tqdm=False)
        assert llm.get_default_sampling_params() == SamplingParams(detokenize=False)
        [beams] = llm.beam_search(prompts[:1], BeamSearchParams(beam_width=1, max_tokens=4, ignore_eos=True))
    assert beams.sequences[0].tokens == prompts[0] + reference["tokens0"][:4].tolist()
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [output.outputs[0].token_ids for output in outputs] == [
        reference[f"tokens{i}"].tolist() for i in range(2)
    ]
