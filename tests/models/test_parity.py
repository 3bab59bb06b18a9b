"""Every family against transformers: golden logits and greedy tokens, through the paged cache.

The goldens are made by `python tests/models/make_goldens.py`.
"""

import json

import numpy as np
import pytest
from family_cases import CASES, DECODE_STEPS, GOLDENS
from paged_harness import STEP_TOKENS, PagedRunner, continue_greedily
from safetensors.numpy import load_file

from jaxllm.models import ModelRegistry


@pytest.mark.parametrize("products", ["cpu", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_family_equals_transformers(name: str, products: str) -> None:
    case, folder = CASES[name], GOLDENS / name
    hf = json.loads((folder / "config.json").read_text())
    model = ModelRegistry.resolve(hf)
    config = model.read_config(hf, dtype="float32", tensor_parallel_size=1, max_model_len=case.max_model_len)
    tensors = load_file(GOLDENS / (case.weights or name) / "model.safetensors")
    runner = PagedRunner(model, config, tensors, products=products)
    golden = np.load(folder / "golden.npz")
    worst = 0.0
    prompts = [golden["prompt0"], golden["prompt1"]]
    for row, (logits, tokens) in enumerate(continue_greedily(runner, prompts, DECODE_STEPS)):
        np.testing.assert_array_equal(tokens, golden[f"tokens{row}"])
        worst = max(worst, float(np.abs(logits - golden[f"logits{row}"]).max()))
    print(f"{name}: largest difference of logits {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_bfloat16_is_near(name: str) -> None:
    """Weights of experts as bits, a correction that stays in float32, products head by head."""
    hf = json.loads((GOLDENS / name / "config.json").read_text())
    model = ModelRegistry.resolve(hf)
    config = model.read_config(hf, dtype="bfloat16", tensor_parallel_size=1)
    runner = PagedRunner(model, config, load_file(GOLDENS / name / "model.safetensors"))
    golden = np.load(GOLDENS / name / "golden.npz")
    logits = runner.step({0: golden["prompt0"][:STEP_TOKENS]})[0]
    assert np.abs(logits - golden["logits0"][:STEP_TOKENS]).mean() < 0.05
