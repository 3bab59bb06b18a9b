"""Steps on a line, kernels' work, and what requests get of it."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from plan_cases import LLAMA, step

from jaxllm.models.qwen_moe import Qwen3Moe
from jaxllm.parallel import make_mesh
from jaxllm.plan.estimate import Estimator, StageWork
from jaxllm.plan.kernels import Kernels
from jaxllm.plan.layout import Layout
from jaxllm.plan.programs import few_layer_counts
from jaxllm.plan.step import on_line
from jaxllm.plan.workload import Workload
from jaxllm.runner.buckets import Buckets
from pallas_kernels.targets import Target
from pallas_kernels.targets.compiled import Traffic

GOLDENS = Path(__file__).parent.parent / "models" / "goldens"


def test_on_line() -> None:
    two, four = step(8, flops=10.0, layers=2), step(8, flops=14.0, layers=4)
    assert on_line(two, four, 0.0) == two.__class__(**{**vars(two), "compile_seconds": 2.0})
    ten = on_line(two, four, 4.0)
    assert (ten.flops, ten.tokens) == (26.0, 8)
    assert ten.collectives["all-reduce"] == Traffic(21, 2100)


def test_estimate_of_memory_bound_decoding() -> None:
    """A model of 819 MB on one v5e, whose kernels do nothing: a step takes a millisecond."""
    decode, prefill = step(2, nbytes=819e6), step(32, flops=1.97e12)
    stages = [StageWork(Kernels([], LLAMA, 0), decode, prefill, logits=0, torus=())]
    layout = Layout.make(Target.parse("v5e"), 1)
    estimator = Estimator(layout, Buckets.up_to(32, 4), stages)
    found = estimator.estimate(Workload(32, 10), requests=2, price_per_chip_hour=3.6)
    assert found.tpot_seconds == pytest.approx(1e-3)
    assert found.ttft_seconds == pytest.approx(10e-3)
    assert found.output_tokens_per_second == pytest.approx(20 / (2 * 10e-3 + 10 * 1e-3))
    assert found.tokens_per_dollar == pytest.approx(found.output_tokens_per_second * 1000)
    twice = Layout.make(Target.parse("v5e:2x2"), 1)
    many = Estimator(twice, Buckets.up_to(32, 4), stages)
    rate = many.estimate(Workload(32, 10), requests=2, price_per_chip_hour=None).output_tokens_per_second
    assert rate == pytest.approx(4 * found.output_tokens_per_second)


def test_estimate_of_stages() -> None:
    """Two stages of a millisecond each, which send 50 MB for a step to a neighbour: another millisecond."""
    decode = dataclasses.replace(step(2, nbytes=819e6), sent=50_000_000)
    prefill = dataclasses.replace(step(32, nbytes=819e6), sent=50_000_000)
    works = [StageWork(Kernels([], LLAMA, 0), decode, prefill, logits=0, torus=(), hops=1)] * 2
    layout = Layout.make(Target.parse("v5e:2x2"), 1, pipeline=2)
    estimator = Estimator(layout, Buckets.up_to(32, 4), works)
    found = estimator.estimate(Workload(64, 10), requests=4, price_per_chip_hour=None)
    assert found.tpot_seconds == pytest.approx(4e-3, rel=1e-3)
    assert found.bubble == pytest.approx(0.5, rel=1e-3)
    # two pieces: the second one leaves the first stage at 2 ms, and is in the other from 3 to 4 ms
    assert found.ttft_seconds == pytest.approx(4e-3, rel=1e-3)
    assert found.output_tokens_per_second == pytest.approx(2 * 4 * 10 / (4 * 2e-3 + 10 * 4e-3), rel=1e-3)
    alone = estimator.estimate(Workload(64, 10), requests=1, price_per_chip_hour=None)
    assert alone.bubble == pytest.approx(0.75, rel=1e-3)


def test_kernels_of_experts() -> None:
    hf = json.loads((GOLDENS / "qwen3-moe" / "config.json").read_text())
    model = Qwen3Moe.read_config(hf, dtype=jnp.bfloat16, tensor_parallel_size=1)
    assert model.mixture is not None
    sparse = model.num_layers - len(model.dense_layers)
    mesh = make_mesh(1)
    layers = range(model.num_layers)
    none, all_of_them = (Kernels.of(model, layers, mesh, 16, grouped) for grouped in (0, 2 * sparse))
    more = all_of_them.work(1, 5, 5).flops - none.work(1, 5, 5).flops
    per_token = 3 * 2 * model.hidden_size * model.mixture.expert_size * model.mixture.routing.per_token
    assert more == 5 * sparse * per_token


def test_few_layers_have_all_kinds() -> None:
    assert few_layer_counts(LLAMA) == (2, 4)
    windows = (8, 8, None) * 4
    mixed = LLAMA.__class__(**{**vars(LLAMA), "layer_windows": windows})
    assert few_layer_counts(mixed) == (3, 6)
    assert few_layer_counts(LLAMA.__class__(**{**vars(LLAMA), "layer_windows": (8,) + (None,) * 11})) is None
    assert few_layer_counts(LLAMA, stages=2) == (2, 4)
    assert few_layer_counts(LLAMA, stages=3) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [({"input_len": 0}, "input_len=0: must be"), ({"concurrency": True}, "concurrency=True: must be")],
)
def test_bad_workloads(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**values)


def test_requests_longer_than_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="together more than max_model_len=100; lower them"):
        Workload(90, 20).check(100)
