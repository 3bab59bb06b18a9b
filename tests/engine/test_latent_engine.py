"""An engine on latent attention: the same tokens in company, cut over devices, and from the prefix cache."""

from typing import Any

import pytest
from small import golden, greedy, small_engine

from jaxllm import Engine

SIZES: dict[str, Any] = {
    "max_model_len": 96,
    "num_pages": 30,
    "max_num_batched_tokens": 8,
    "enforce_eager": True,
}
PROMPTS = [golden("deepseek-v3")[f"prompt{row}"].tolist() for row in (0, 1)]
EXPECTED = [golden("deepseek-v3")[f"tokens{row}"].tolist() for row in (0, 1)]


def run(engine: Engine) -> list[list[int]]:
    outputs = engine.generate([*PROMPTS, *PROMPTS], greedy())
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("devices", [1, 2])
def test_tokens_are_transformers(devices: int) -> None:
    """Four requests on pages for two, so that some are computed again, twice; each device has all latents."""
    with small_engine("deepseek-v3", tensor_parallel_size=devices, **SIZES) as engine:
        assert run(engine) == run(engine) == [*EXPECTED, *EXPECTED]
        figures = engine.get_metrics()
        assert figures["preemptions_total"] > 0
        assert figures["prefix_cache_hits_total"] > 0
        assert engine.attention_backend.backend.name == "xla"
        runner = engine._core.runner
        (stage,) = runner.stages
        _, pools, _ = stage.arrays
        kept = runner.lowering.model.head_dim * 4 * runner.num_pages * 4
        assert [pool.addressable_shards[0].data.nbytes for pool in pools] == [kept, kept]


def test_kernels_of_keys_and_values_are_refused() -> None:
    with pytest.raises(
        NotImplementedError, match=r"'cpu' does not serve this model on cpu: .*latent attention"
    ):
        small_engine("deepseek-v3", attention_backend="cpu", **SIZES)
