"""The same logits on any number of devices, and only sums between them."""

import json

import jax
import numpy as np
import pytest
from family_cases import CASES, DECODE_STEPS, GOLDENS
from paged_harness import STEP_TOKENS, PagedRunner, continue_greedily
from safetensors.numpy import load_file

from jaxllm.models import CausalLM, DecoderConfig, ModelRegistry
from pallas_kernels.targets.compiled import COLLECTIVES, CompiledText

pytestmark = pytest.mark.usefixtures("quick_compile")

# All parts that are cut: biases, soft caps and a tied head, norms over all heads, learned positions, sinks,
# biased and shared experts, latents.
FAMILIES = ("llama", "gemma2", "olmo2", "gpt2", "gpt-oss", "qwen2-moe", "deepseek-v3")


def load(name: str, devices: int) -> tuple[type[CausalLM], DecoderConfig, PagedRunner]:
    hf = json.loads((GOLDENS / name / "config.json").read_text())
    model = ModelRegistry.resolve(hf)
    config = model.read_config(hf, dtype="float32", tensor_parallel_size=devices)
    return model, config, PagedRunner(model, config, load_file(GOLDENS / name / "model.safetensors"))


@pytest.mark.parametrize(("name", "devices"), [("llama", 2), ("llama", 4), *((name, 8) for name in FAMILIES)])
def test_cut_model_gives_the_golden_logits(name: str, devices: int) -> None:
    _, config, runner = load(name, devices)
    assert CASES[name].weights is None
    assert config.cache_heads == max(config.num_kv_heads, devices)
    golden = np.load(GOLDENS / name / "golden.npz")
    prompts = [golden["prompt0"], golden["prompt1"]]
    for row, (logits, tokens) in enumerate(continue_greedily(runner, prompts, DECODE_STEPS)):
        np.testing.assert_array_equal(tokens, golden[f"tokens{row}"])
        np.testing.assert_allclose(logits, golden[f"logits{row}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_pages_are_cut_evenly(name: str) -> None:
    _, _, runner = load(name, 8)
    cut = [w for w in (*runner.weights, *runner.cache) if not w.sharding.is_fully_replicated]
    for array in cut:
        assert {shard.data.size for shard in array.addressable_shards} == {array.size // 8}
    whole = sum(w.size for w in runner.weights if w.sharding.is_fully_replicated)
    assert whole < 0.2 * sum(w.size for w in runner.weights)  # norms, biases of sums, learned positions


@pytest.mark.parametrize("name", FAMILIES)
def test_step_adds_up_and_gathers_only_logits(name: str) -> None:
    _, config, runner = load(name, 4)
    tokens, batch = runner.inputs({0: list(range(20)), 1: [1]})
    with jax.set_mesh(runner.mesh):
        text = runner.run.lower(runner.weights, runner.cache, tokens, batch).compile().as_text()
    assert text is not None
    found = [one for one in CompiledText.parse(text).instructions if one.opcode in COLLECTIVES]
    rows = config.geometry.padded_vocab_size
    kinds = [one.opcode for one in found]
    assert set(kinds) == {"all-reduce", "all-gather"}
    gathered = [one.result.partition("{")[0] for one in found if one.opcode == "all-gather"]
    assert gathered == [f"f32[{STEP_TOKENS},{rows}]"]
    # One sum for the embedding, and two for each layer; OLMo 2's norms of queries and keys share a third.
    layer = 3 if name == "olmo2" else 2
    assert kinds.count("all-reduce") == 1 + layer * config.num_layers


@pytest.mark.parametrize(
    ("field", "value", "devices"),
    [
        ("num_attention_heads", 6, 4),
        ("intermediate_size", 81, 2),
        ("num_key_value_heads", 3, 2),
        ("tensor_parallel_size", 8, 8),
    ],
)
def test_what_does_not_divide_is_named(field: str, value: int, devices: int) -> None:
    hf = json.loads((GOLDENS / "mistral" / "config.json").read_text())
    hf |= {"num_attention_heads": 24, "num_key_value_heads": 3 if devices == 8 else 6, field: value}
    with pytest.raises(
        ValueError, match=rf"^{field}={value}: must be a multiple of \w+={devices if devices < 8 else 3}$"
    ):
        ModelRegistry.resolve(hf).read_config(hf, dtype="float32", tensor_parallel_size=devices)
