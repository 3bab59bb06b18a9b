"""The benchmark of a whole engine on a GPU, with a tiny model on the CPU."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pallas_kernels.timing import Effort


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parent.parent / "device" / "bench.py"
    spec = importlib.util.spec_from_file_location("device_bench", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tiny(bench: Any, tmp_path: Path) -> None:
    report = bench.run("tiny", "xla", peer=False, effort=Effort(1, 0.01))
    named = {one["name"]: one for one in report["figures"]}
    assert list(named) == [
        "decode 1 x 64",
        "decode 4 x 64",
        "decode 1 x 128",
        "decode 4 x 128",
        "prefill 256",
    ]
    assert all(one["seconds"] > 0 and one["fraction"] > 0 for one in named.values())
    assert json.loads(json.dumps(report)) == report
    text = bench.as_markdown(report)
    assert "| decode 4 x 128 |" in text
    assert "transformers is left out: not asked for." in text


def test_least_work(bench: Any) -> None:
    """Counted by hand for a model of one layer."""

    class Model:
        vocab_size, hidden_size, num_layers = 10, 4, 1
        num_heads, num_kv_heads, head_dim = 2, 1, 2
        tie_word_embeddings = False

    # 100 weights of which 40 are the embedding; keys and values of 2 * 8 tokens, 4 numbers each
    assert bench.decode_bytes(Model, 200, 2, 8) == 2 * (100 - 40) + 2 * 2 * 8 * 4
    # 20 weights of the layer; scores and results of 3 * 3 / 2 pairs, 2 heads of 2
    assert bench.prefill_flops(Model, 100, 3) == 2 * 20 * 3 + 2 * 2 * (3 * 3 / 2) * 2 * 2
    Model.tie_word_embeddings = True
    assert bench.decode_bytes(Model, 200, 1, 0) == 200
    assert bench.prefill_flops(Model, 60, 1) == 2 * 20 + 2 * 2 * 0.5 * 2 * 2


def test_what_does_not_fit_is_left_out(bench: Any) -> None:
    figure = {
        "name": "decode 9 x 9", "phase": "decode", "seconds": None, "tokens_per_second": 0.0, "fraction": 0.0,
        "gap": 0.0, "reason": "needs 99 pages",
    }  # fmt: skip
    report = {
        "model": "tiny", "machine": {}, "limits": {"copy": 1e9, "matmul": 1e12}, "figures": [figure],
        "transformers": [{"name": "decode 9 x 9", "reason": "out of memory"}],
    }  # fmt: skip
    assert "| decode 9 x 9 | left out: needs 99 pages | | | | | out of memory |" in bench.as_markdown(report)
