"""Plans made with the real compilers, held to what is known of the models by other means."""

import json
from functools import cache
from pathlib import Path

import pytest

from jaxllm.cli.main import main
from jaxllm.plan.layout import Layout
from jaxllm.plan.plan import Plan
from jaxllm.plan.planner import planner_of
from jaxllm.plan.step import Step
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


def steps_of(plan: Plan) -> dict[str, Step]:
    """Those of a plan without stages."""
    [stage] = plan.stages
    return {"prefill": stage.prefill, "decode": stage.decode}


def test_whole_model_on_tpu() -> None:
    plan = llama_on_v5e()
    assert plan.weight_bytes == 2 * PARAMETERS
    assert plan.attention_backend == "tpu"
    multiplied = PARAMETERS - EMBEDDING
    steps = steps_of(plan)
    for step in steps.values():
        head = 2 * EMBEDDING * 256  # logits are made for the rows that are sampled
        expected = (2 * (multiplied - EMBEDDING) * step.tokens + head) / 8
        assert step.flops == pytest.approx(expected, rel=0.02)
    weights = 2 * multiplied / 8
    assert weights < steps["decode"].nbytes < 1.5 * weights, (
        "XLA moves more than the weights and some activations"
    )
    assert steps["decode"].collectives["all-reduce"].count == 65
    memory = plan.memory
    total = memory.weights + memory.rows + memory.temporaries + memory.pages
    assert total == pytest.approx(0.9 * memory.usable, rel=1e-3)
    assert memory.code_fits


def test_few_layers_stand_for_all() -> None:
    """Each step grows with the layers as a line does."""
    whole, few = llama_on_v5e(), llama_on_v5e(few_layers=True)
    assert few.compiled_layers == (2, 4)
    for name in ("prefill", "decode"):
        one, other = steps_of(whole)[name], steps_of(few)[name]
        assert other.flops == pytest.approx(one.flops, rel=0.01)
        assert other.collectives == one.collectives
        assert other.temporaries + 2 * other.outputs == pytest.approx(
            one.temporaries + 2 * one.outputs, rel=0.05
        )
    assert steps_of(few)["decode"].nbytes == pytest.approx(steps_of(whole)["decode"].nbytes, rel=0.02)
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
    [stage] = found["stages"]
    assert stage["decode"]["flops"] == pytest.approx(2 * 256 * (attention + head) / 4, rel=0.05)
    # of 128 experts all are used: their weights are read once, which is what a step takes at the least
    weights = 36 * 128 * 3 * 2880 * 2880 * 2 / 4
    least = weights / 3.35e12
    assert least < found["estimate"]["tpot_seconds"] < 1.5 * least


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A model of two heads and three layers."""
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "torch_dtype": "bfloat16",
                "vocab_size": 1024,
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "max_position_embeddings": 512,
            }
        )
    )
    return str(config)


FLAGS = ["--max-num-seqs", "4", "--max-num-batched-tokens", "8", "--input-len", "64", "--output-len", "8"]
FLAGS += ["--no-progress"]


def test_stages_on_tpu(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each stage's programs are made for its own chips, which are neighbours, and none is in two stages."""
    sizes = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"]
    assert main(["plan", small, "--target", "v5e:2x2", *sizes, *FLAGS, "--json"]) == 0
    first, last = json.loads(capsys.readouterr().out)["stages"]
    assert sorted(first["chips"] + last["chips"]) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for stage, sums in ((first, 1 + 2 * 2), (last, 2 * 1)):
        (a, b), (c, d) = stage["chips"]
        assert abs(a - c) + abs(b - d) == 1
        assert stage["decode"]["collectives"]["all-reduce"]["count"] == sums
    assert "all-gather" not in first["decode"]["collectives"], "logits are made by the last stage"
    assert last["decode"]["collectives"]["all-gather"]["count"] == 1
    embedding, layers = 2 * 1024 * 256 // 2, 2 * (4 * 256 * 256 + 3 * 256 * 512) // 2
    norms = 2 * 256  # bytes of one, whole on each chip
    assert first["memory"]["weights"] == embedding + 2 * (layers + 2 * norms)
    assert last["memory"]["weights"] == embedding + layers + 3 * norms
    assert first["prefill"]["sent"] == 2 * 8 * 256


def test_data_groups_on_tpu(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two groups of two chips: within one it is as in an engine alone, between them go tokens and counts."""
    config = json.loads(Path(small).read_text())
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    Path(small).write_text(json.dumps(config | experts | {"architectures": ["MixtralForCausalLM"]}))
    sizes = ["--tensor-parallel-size", "2", "--data-parallel-experts"]
    sizes += ["--enable-eplb", "--num-redundant-experts", "4"]
    assert main(["plan", small, "--target", "v5e:2x2", *sizes, *FLAGS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"]["data_parallel_size"], found["attention_backend"]) == (2, "tpu")
    [stage] = found["stages"]
    for name in ("prefill", "decode"):
        within = {kind: one["count"] for kind, one in stage[name]["collectives"].items()}
        assert within == {"all-reduce": 1 + 2 * 3, "all-gather": 1}
        between = {kind: one["count"] for kind, one in stage[name]["between_groups"].items()}
        assert between == {"ragged-all-to-all": 2 * 3, "all-reduce": 3}
    # heads and vocabulary are a group's own, of 12 slots each chip has half of 6; norms, routers and tables
    # are whole
    layer = 2 * (4 * 256 * 256) // 2 + 6 * 2 * (3 * 256 * 512) // 2 + 2 * (2 * 256 + 8 * 256) + 4 * 8 * 2
    assert stage["memory"]["weights"] == 3 * layer + 2 * (2 * 1024 * 256) // 2 + 2 * 256


def test_programs_are_saved(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "programs"
    assert main(["plan", small, "--target", "v5e", *FLAGS, "--num-pages", "100", "--save", str(folder)]) == 0
    said = capsys.readouterr().err
    count = len(list(folder.glob("whole/*.program")))
    assert f"{count} programs are in {folder}" in said
    assert "--num-pages 100" in said
