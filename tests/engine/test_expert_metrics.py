"""Tokens that go to each expert, counted on the device."""

from typing import Any

import numpy as np
import pytest
from small import golden, greedy, small_engine

from jaxllm.server.metrics import _labelled

SIZES: dict[str, Any] = {
    "max_model_len": 96,
    "num_pages": 60,
    "max_num_batched_tokens": 8,
    "enforce_eager": True,
}


def test_every_token_of_every_step_is_counted() -> None:
    """Two layers, three experts for a token; padding tokens go to none."""
    prompts = [golden("mixtral")[f"prompt{row}"].tolist() for row in (0, 1)]
    with small_engine("mixtral", expert_metrics=True, **SIZES) as engine:
        assert not any(name.startswith("expert_tokens") for name in engine.get_metrics())
        outputs = engine.generate(prompts, greedy())
        figures = engine.get_metrics()
        tokens = engine.metrics.expert_tokens
    for row, output in enumerate(outputs):
        assert output.outputs[0].token_ids == golden("mixtral")[f"tokens{row}"].tolist()
    assert tokens is not None
    assert tokens.shape == (2, 8)
    np.testing.assert_array_equal(tokens.sum(axis=1), 3 * figures["scheduled_tokens_total"])
    assert figures['expert_tokens_total{layer="1",expert="7"}'] == tokens[1, 7] > 0


def test_nothing_is_counted_unless_asked_for() -> None:
    with small_engine("mixtral", **SIZES) as engine:
        engine.generate([[5, 6, 7]], greedy(2))
        assert engine.metrics.expert_tokens is None


def test_without_experts_it_is_refused() -> None:
    with pytest.raises(ValueError, match="expert_metrics=True: this model has no experts"):
        small_engine("llama", expert_metrics=True, **SIZES)


def test_as_prometheus_reads_it() -> None:
    figures = {f'expert_tokens_total{{layer="0",expert="{n}"}}': n + 1.0 for n in (0, 1)}
    families = {family.name: family for family in _labelled("jaxllm", {"engine": "0"}, figures)}
    samples = families["jaxllm:expert_tokens"].samples
    assert [(sample.name, sample.labels, sample.value) for sample in samples] == [
        ("jaxllm:expert_tokens_total", {"engine": "0", "layer": "0", "expert": str(n)}, n + 1) for n in (0, 1)
    ]
