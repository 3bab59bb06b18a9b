"""Plans made with the real compilers, held to what is known of the models by other means."""

import json
from functools import cache
from pathlib import Path

import pytest

from jaxllm.cli.main import main
from jaxllm.plan.layout import Layout
from jaxllm.plan.plan import Plan
from jaxllm.plan.planner import planner_of
from jaxllm.plan.workload import Workload
from pallas_kernels.targets import Target

pytestmark = pytest.mark.aot
LLAMA = "meta-llama/Meta-Llama-3-8B"
PARAMETERS = 8_030_261_248
EMBEDDING = 128256 * 4096
"""Looked up, and not multiplied with."""


@cache
def llama_on_v5e(few_layers: bool = False) -> Plan:
    planner = planner_of(
        LLAMA, Workload(), few_layers=few_layers, options={"tensor_parallel_size": 8, "progress": False}
    )
    return planner.plan(Layout.make(Target.parse("v5e:2x4"), 8))


def test_whole_model_on_tpu() -> None:
    plan = llama_on_v5e()
    assert plan.weight_bytes == 2 * PARAMETERS
    assert plan.attention_backend == "tpu"
    multiplied = PARAMETERS - EMBEDDING
    for step in (plan.prefill, plan.decode):
        head = 2 * EMBEDDING * 256  # logits are made for the rows that are sampled
        expected = (2 * (multiplied - EMBEDDING) * step.tokens + head) / 8
        assert step.flops == pytest.approx(expected, rel=0.02)
    weights = 2 * multiplied / 8
    assert weights < plan.decode.nbytes < 1.5 * weights, (
        "XLA moves more than the weights and some activations"
    )
    assert plan.decode.collectives["all-reduce"].count == 65
    memory = plan.memory
    total = memory.weights + memory.rows + memory.temporaries + memory.pages
    assert total == pytest.approx(0.9 * memory.usable, rel=1e-3)
    assert memory.code_fits


def test_few_layers_stand_for_all() -> None:
    """Each step grows with the layers as a line does."""
    whole, few = llama_on_v5e(), llama_on_v5e(few_layers=True)
    assert few.compiled_layers == (2, 4)
    for name in ("prefill", "decode"):
        one, other = getattr(whole, name), getattr(few, name)
        assert other.flops == pytest.approx(one.flops, rel=0.01)
        assert other.collectives == one.collectives
        assert other.temporaries + 2 * other.outputs == pytest.approx(
            one.temporaries + 2 * one.outputs, rel=0.05
        )
    assert few.decode.nbytes == pytest.approx(whole.decode.nbytes, rel=0.02)
    # a prompt's traffic is no line: few layers leave activations room in VMEM; products take the time
    assert few.estimate.ttft_seconds == pytest.approx(whole.estimate.ttft_seconds, rel=0.05)
    rate = whole.estimate.output_tokens_per_second
    assert few.estimate.output_tokens_per_second == pytest.approx(rate, rel=0.02)


def test_experts_on_h100(capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel multiplies a token with its own experts; XLA would with all, and a plan would show it."""
    flags = ["--tensor-parallel-size", "4", "--max-model-len", "4096", "--max-num-batched-tokens", "256"]
    flags += ["--few-layers", "--no-progress", "--json"]
    assert main(["plan", "openai/gpt-oss-120b", "--target", "h100:4", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compiled_layers"] == [2, 4]
    attention, head = 36 * (2880 * (64 + 2 * 8) * 64 + 64 * 64 * 2880), 201088 * 2880
    assert found["decode"]["flops"] == pytest.approx(2 * 256 * (attention + head) / 4, rel=0.05)
    # of 128 experts all are used: their weights are read once, which is what a step takes at the least
    weights = 36 * 128 * 3 * 2880 * 2880 * 2 / 4
    least = weights / 3.35e12
    assert least < found["estimate"]["tpot_seconds"] < 1.5 * least


def test_programs_are_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "torch_dtype": "bfloat16",
                "vocab_size": 1024,
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 512,
            }
        )
    )
    flags = ["--max-num-seqs", "4", "--max-num-batched-tokens", "8", "--input-len", "64", "--output-len", "8"]
    flags += ["--num-pages", "100", "--no-progress"]
    folder = tmp_path / "programs"
    assert main(["plan", str(config), "--target", "v5e", *flags, "--save", str(folder)]) == 0
    said = capsys.readouterr().err
    count = len(list(folder.glob("whole/*.program")))
    assert f"{count} programs are in {folder}" in said
    assert "--num-pages 100" in said
