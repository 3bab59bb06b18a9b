"""Every family against transformers running live, with other weights and prompts than the goldens'."""

from pathlib import Path

import numpy as np
import pytest
from family_cases import DECODE_STEPS, LIVE_CASES
from paged_harness import PagedRunner, continue_greedily
from safetensors.numpy import load_file

from jaxllm.models import ModelRegistry

pytestmark = pytest.mark.parity

SEED = 1000


@pytest.mark.parametrize("name", LIVE_CASES)
def test_family_equals_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="transformers runs its models in torch: pip install -e '.[parity]'")
    import transformers_reference as reference

    case, theirs = LIVE_CASES[name], reference.make_model(LIVE_CASES[name], SEED)
    prompts = reference.make_prompts(theirs.config.get_text_config().vocab_size, SEED)
    expected = [reference.continue_greedily(theirs, prompt) for prompt in prompts]
    reference.save_checkpoint(theirs, tmp_path)
    hf = {**theirs.config.to_dict(), "architectures": [case.architecture]}
    model = ModelRegistry.resolve(hf)
    config = model.read_config(hf, dtype="float32", tensor_parallel_size=1, max_model_len=case.max_model_len)
    ours = continue_greedily(
        PagedRunner(model, config, load_file(tmp_path / "model.safetensors")), prompts, DECODE_STEPS
    )
    worst = 0.0
    for (logits, tokens), (their_logits, their_tokens) in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(tokens, their_tokens)
        worst = max(worst, float(np.abs(logits - their_logits).max()))
    print(f"{name}: largest difference of logits {worst:.1e}")
    assert worst < 1e-4
