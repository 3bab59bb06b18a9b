"""Options that parity is to hold change the logits: a golden file that could not tell would show here."""

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
    ("smollm3", {"no_rope_layers": [0, 1, 1]}),
    ("mistral", {"sliding_window": 10}),
    ("gemma2", {"attn_logit_softcapping": 4.0}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 41}),
    ("gemma3", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
    ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 100.0}}}),
    ("phi3", {"original_max_position_embeddings": 128}),
    ("gpt2", {"scale_attn_weights": False}),
    ("qwen2-moe", {"norm_topk_prob": True}),
    ("qwen3-moe", {"norm_topk_prob": False}),
    ("gpt-oss", {"swiglu_limit": 1.6}),
    ("deepseek-v2", {"topk_method": "greedy"}),
    ("deepseek-v3", {"topk_group": 3}),
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
