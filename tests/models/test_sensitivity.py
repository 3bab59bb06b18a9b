"""Each field of a config that parity is to hold changes the logits: one that is ignored shows here."""

import json
from typing import Any

import numpy as np
import pytest
from family_cases import GOLDENS
from paged_harness import STEP_TOKENS, PagedRunner
from safetensors.numpy import load_file

from jaxllm.models import ModelRegistry

# Case, and the fields that are changed in its config.
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rms_norm_eps": 1e-2}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"rope_parameters": {"rope_theta": 600.0}}),
    ("smollm3", {"no_rope_layers": [0, 1, 1]}),
    ("smollm3", {"use_sliding_window": False}),
    ("mistral", {"sliding_window": 10}),
    ("qwen2", {"layer_types": ["full_attention"] * 3}),
    ("qwen3", {"rms_norm_eps": 1e-2}),
    ("gemma2", {"attn_logit_softcapping": 4.0}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 41}),
    ("gemma2", {"sliding_window": 8}),
    ("gemma3", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
    ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 100.0}}}),
    ("phi3", {"sliding_window": None}),
    ("phi3", {"original_max_position_embeddings": 128}),
    ("olmo2", {"rms_norm_eps": 1e-2}),
    ("gpt2", {"layer_norm_epsilon": 1e-2}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"activation_function": "gelu"}),
]


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=str)
def test_changed_field_changes_logits(name: str, change: dict[str, Any]) -> None:
    hf = json.loads((GOLDENS / name / "config.json").read_text()) | change
    model = ModelRegistry.resolve(hf)
    config = model.read_config(hf, dtype="float32", tensor_parallel_size=1)
    golden = np.load(GOLDENS / name / "golden.npz")
    runner = PagedRunner(model, config, load_file(GOLDENS / name / "model.safetensors"))
    logits = runner.step({0: golden["prompt0"][:STEP_TOKENS]})[0]
    assert np.abs(logits - golden["logits0"][:STEP_TOKENS]).max() > 1e-3
