"""What multiplies with the weights: packed on CPU where it can be, and said where it cannot."""

import re
from typing import Any

import pytest
from small import CHECKPOINTS, golden, greedy, small_engine

from jaxllm import Engine
from jaxllm.parallel import make_mesh
from jaxllm.runner.products import Products

SMALL: dict[str, Any] = {"max_model_len": 96, "max_num_batched_tokens": 8, "enforce_eager": True}


def run(engine: Engine) -> list[int]:
    prompt = golden("llama")["prompt0"].tolist()
    return list(engine.generate([prompt], greedy(16))[0].outputs[0].token_ids)


@pytest.mark.parametrize(("name", "taken"), [("auto", "cpu"), ("xla", "xla"), ("reference", "reference")])
def test_same_tokens_whatever_multiplies(name: str, taken: str) -> None:
    with small_engine("llama", matmul_backend=name, **SMALL) as engine:
        assert engine.matmul_backend.name == taken
        assert engine.get_metrics()[f'matmul_backend_info{{backend="{taken}"}}'] == 1.0
        assert run(engine) == golden("llama")["tokens0"][:16].tolist()


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_weights_come_back_packed_after_a_sleep(load_format: str) -> None:
    with small_engine("llama", load_format=load_format, **SMALL) as engine:
        before = run(engine)
        for level in (1, 2):
            engine.sleep(level)
            engine.wake_up()
            assert run(engine) == before


def test_several_devices() -> None:
    """Packed weights are not cut, so XLA multiplies, and says so; asked for by name they are refused."""
    mesh = make_mesh(2)
    with small_engine("llama", mesh=mesh, tensor_parallel_size=2, **SMALL) as engine:
        assert str(engine.matmul_backend).startswith("xla (not cpu: 2 devices: packed weights are not cut")
    with pytest.raises(NotImplementedError, match=r"matmul_backend='cpu' does not serve .*: 2 devices"):
        small_engine("llama", mesh=mesh, tensor_parallel_size=2, matmul_backend="cpu", **SMALL)


def test_dtype_that_is_not_packed(caplog: pytest.LogCaptureFixture) -> None:
    """Said in the log, by the engine, and in the metrics."""
    with (
        caplog.at_level("INFO", "jaxllm.runner.products"),
        small_engine("llama", dtype="float16", **SMALL) as engine,
    ):
        assert "products: xla (not cpu: weights of float16" in caplog.text
        assert engine.matmul_backend == Products(reason="weights of float16: packed are float32, bfloat16")
        label = re.escape('matmul_backend_info{backend="xla",reason="weights of float16')
        assert any(re.match(label, name) for name in engine.get_metrics())


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"matmul_backend='mkl': .* there are auto, xla, cpu, reference"):
        Engine.from_pretrained(str(CHECKPOINTS / "llama"), matmul_backend="mkl")
