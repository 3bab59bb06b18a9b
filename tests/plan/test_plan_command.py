"""`jaxllm plan` from end to end, with this machine's CPUs in the place of chips."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plan_cases import CONFIG, SMALL

from jaxllm import Engine
from jaxllm.cli.main import main
from jaxllm.plan import programs
from jaxllm.plan.step import Step
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.lowering import Lowering
from pallas_kernels.targets import Target


@pytest.mark.usefixtures("cpus")
def test_one_layout(model: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", model(), "--target", "v5e:2x4", "--tensor-parallel-size", "2", *SMALL]
    picture = tmp_path / "plan.png"
    assert main([*arguments, "--plot", str(picture), "--price-per-chip-hour", "1.2"]) == 0
    printed = capsys.readouterr().out
    assert "on v5e:2x4, tensor_parallel_size=2, data_parallel_size=4" in printed
    for words in (
        "weights",
        "pages hold",
        "all-reduce",
        "time to first token",
        "per dollar",
        "nothing was run",
    ):
        assert words in printed
    assert picture.stat().st_size > 10_000


@pytest.mark.usefixtures("steps")
def test_figures(model: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        model(num_hidden_layers=6),
        "--target",
        "v5e:2x4",
        "--tensor-parallel-size",
        "2",
        *SMALL,
    ]
    assert main([*arguments, "--json", "--num-pages", "50", "--few-layers"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compiled_layers"] == [2, 4]
    assert found["layout"]["replica"] == "v5e:2x2"
    [stage] = found["stages"]
    memory = stage["memory"]
    assert memory["num_pages"] == 50
    parts = ("weights", "rows", "temporaries", "pages", "unused")
    assert sum(memory[name] for name in parts) == memory["usable"]
    assert found["estimate"]["requests"] == 4
    assert stage["decode"]["collectives"]["all-reduce"]["count"] == 1 + 2 * 6
    assert (stage["prefill"]["flops"], stage["decode"]["flops"]) == (6 * 16e12, 6 * 8e12)


@pytest.mark.usefixtures("cpus")
def test_stages(model: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled: each stage has its own layers, and the pages are those of the fullest one."""
    arguments = ["plan", model(num_hidden_layers=3), "--target", "v5e:2x2", "--pipeline-parallel-size", "2"]
    arguments += ["--tensor-parallel-size", "2", *SMALL]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"]["pipeline_parallel_size"], found["layout"]["data_parallel_size"]) == (2, 1)
    first, last = found["stages"]
    assert (first["layers"], last["layers"]) == ([0, 2], [2, 3])
    assert (first["chips"], last["chips"]) == ([[0, 0], [0, 1]], [[1, 0], [1, 1]])
    assert first["memory"]["num_pages"] == last["memory"]["num_pages"]
    assert found["fullest"] == 0, "a layer more takes more than the head does"
    assert last["memory"]["pages"] * 2 == first["memory"]["pages"]
    assert first["decode"]["collectives"]["all-reduce"]["count"] == 1 + 2 * 2
    assert last["decode"]["collectives"]["all-reduce"]["count"] == 2
    # four requests are in two steps of two tokens each; hidden states of 32 in bfloat16, and tokens
    assert (first["decode"]["tokens"], first["decode"]["sent"], last["decode"]["sent"]) == (2, 2 * 32 * 2, 16)
    assert 0 < found["estimate"]["bubble"] < 1

    picture = tmp_path / "plan.png"
    assert main([*arguments, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "pipeline_parallel_size=2" in printed
    for words in ("stage 1  2 to 2", "of stage 0, the fullest", "sent on: prefill", "bubble"):
        assert words in printed
    assert picture.stat().st_size > 10_000


@pytest.mark.usefixtures("steps")
def test_stages_of_few_layers(model: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--target", "v5e:2x2", "--pipeline-parallel-size", "2", "--few-layers", "--json", *SMALL]
    assert main(["plan", model(num_hidden_layers=11), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["compiled_layers"], found["extrapolated"]) == ([2, 4], True)
    # the small models have four and eight layers, whose steps are made up to grow with these
    assert [stage["decode"]["flops"] for stage in found["stages"]] == [12 * 2e12, 10 * 2e12]


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.usefixtures("cpus")
def test_data_groups(model: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled: layers without experts are a group's own, and tokens pass between groups."""
    arguments = ["plan", model(**MIXTRAL), "--target", "v5e:2x2", "--tensor-parallel-size", "2", *SMALL]
    arguments += ["--data-parallel-size", "2", "--data-parallel-experts"]
    arguments += ["--enable-eplb", "--num-redundant-experts", "2"]
    assert main([*arguments, "--num-pages", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    layout = found["layout"]
    assert (layout["chips"], layout["data_parallel_size"], layout["data_parallel_experts"]) == (4, 2, True)
    assert layout["replica"] == "v5e:2x2"
    [stage] = found["stages"]
    # matrices of 32 by 32 for queries, keys, values and outputs; of three slots of experts halves; norms,
    # routers and tables are whole
    layers = 4 * 32 * 32 * 2 // 2 + 3 * (3 * 32 * 64 * 2) // 2 + (2 * 32 + 4 * 32) * 2 + 4 * 2 * 4
    assert stage["memory"]["weights"] == 2 * layers + (2 * 64 * 32 * 2) // 2 + 32 * 2
    assert (stage["memory"]["num_pages"], found["together"]["num_pages"]) == (50, 100)
    assert found["estimate"]["requests"] == 4
    assert (found["workload_requests"], found["together"]["workload_requests"]) == (16, 32)  # of three pages
    for name in ("prefill", "decode"):
        # as in an engine alone: a sum for the embedding and two a layer, a gather of logits
        within = {kind: one["count"] for kind, one in stage[name]["collectives"].items()}
        assert within == {"all-reduce": 1 + 2 * 2, "all-gather": 1}
        between = {kind: one["count"] for kind, one in stage[name]["between_groups"].items()}
        assert between == {"all-gather": 3 * 2, "reduce-scatter": 2}
    picture = tmp_path / "plan.png"
    assert main([*arguments, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "on v5e:2x2, tensor_parallel_size=2, data_parallel_size=2, data_parallel_experts",
        "in each group",
        "in each data group; those of all 2 hold",
        "reduce-scatter between groups",
        "8 requests, 4 in each data group",
    ):
        assert words in printed
    assert picture.stat().st_size > 10_000


@pytest.mark.usefixtures("steps")
def test_signals_end_a_compilation(model: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers in Python would not run before the compiler is back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    made, seen = programs.compile_step, []

    def compile_step(lowering: Lowering, bucket: Bucket, num_pages: int) -> Step:
        seen.append([signal.getsignal(number) for number in numbers])
        return made(lowering, bucket, num_pages)

    monkeypatch.setattr(programs, "compile_step", compile_step)
    assert main(["plan", model(), "--target", "v5e", *SMALL]) == 0
    assert seen == [[signal.SIG_DFL, signal.SIG_DFL]] * 2
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.usefixtures("steps")
def test_a_model_that_is_too_large(model: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    large = model(vocab_size=2_000_000, hidden_size=4096, intermediate_size=64, num_attention_heads=32)
    assert main(["plan", large, "--target", "v5e:2x4", *SMALL]) == 1
    said = capsys.readouterr().err
    assert re.search(r"weights and rows take 3\d\.\d GB of each chip, 1\d\.\d GB more than memory_util", said)
    assert "v5e:2x4, tensor_parallel_size=4, data_parallel_size=2 would hold them" in said
    assert "count as bfloat16" not in said


@pytest.mark.usefixtures("steps")
def test_packed_weights_count_unpacked(capsys: pytest.CaptureFixture[str]) -> None:
    """As the engine has them once they are loaded, and the refusal says so, and what would hold them."""
    flags = ["--tensor-parallel-size", "2", "--max-model-len", "8192", *SMALL]
    assert main(["plan", "openai/gpt-oss-120b", "--target", "h100:2", *flags]) == 1
    said = capsys.readouterr().err
    assert "weights and rows take 116.9 GB of each chip" in said  # two bytes for each of 117 billion weights
    assert "weights of mxfp4 count as bfloat16, which the engine makes of them when it loads" in said
    assert "h100:4, tensor_parallel_size=4, data_parallel_size=1 would hold them" in said


@pytest.mark.usefixtures("steps")
def test_weights_beside_pages_that_were_counted(
    model: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """They may take more than `memory_utilization`, which is for pages that fill what is left."""
    large = model(vocab_size=970_000, hidden_size=4096, num_attention_heads=32)
    assert main(["plan", large, "--target", "v5e", *SMALL]) == 1
    assert "more than memory_utilization=0.9 of its 16.9 GB" in capsys.readouterr().err
    assert main(["plan", large, "--target", "v5e", "--num-pages", "20", "--json", *SMALL]) == 0
    [stage] = json.loads(capsys.readouterr().out)["stages"]
    assert stage["memory"]["num_pages"] == 20
    larger = model(vocab_size=1_100_000, hidden_size=4096, num_attention_heads=32)
    assert main(["plan", larger, "--target", "v5e", "--num-pages", "20", *SMALL]) == 1
    assert re.search(r"GB more than its 16\.9 GB", capsys.readouterr().err)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "v9:2x2"], "there is no chip 'v9'; there are v5e"),
        (["--target", "v5e:3x3"], "v5e comes as v5e:1x1, v5e:2x2"),
        (["--target", "v5e:2x2", "--tensor-parallel-size", "3"], "tensor_parallel_size=3: must divide the 4"),
        (
            ["--target", "v5e:2x4", "--pipeline-parallel-size", "4"],
            "pipeline_parallel_size=4: must be at most the model's 2 layers",
        ),
        (["--target", "v5e", "--input-len", "500"], "together more than max_model_len=128"),
        (["--target", "v5e", "--dtype", "float32"], "dtype=float32: rates are known for bfloat16"),
        (["--target", "v5e", "--concurrency", "5"], "concurrency=5: .* max_num_seqs=4 .* hold 4 requests"),
        (
            ["--target", "v5e", "--concurrency", "4", "--max-num-batched-tokens", "2"],
            "max_num_batched_tokens=2 hold 2 requests of 40 tokens",
        ),
        (
            ["--target", "v5e:2x2", "--data-parallel-experts"],
            "data_parallel_experts=True: the model has no experts",
        ),
        (["--target", "h100", "--save", "x"], "--save: programs for h100 are not kept"),
        (
            ["--target", "v5p:2x2x2", "--tensor-parallel-size", "8", "--save", "x"],
            "several hosts of v5p",
        ),
    ],
)
def test_what_cannot_be_planned(
    flags: list[str], message: str, model: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--output-len", "8", *SMALL[4:], *([] if "--input-len" in flags else SMALL[:2])]
    assert main(["plan", model(), *sizes, *flags]) == 1
    [line] = capsys.readouterr().err.strip().split("\n")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--target"),
        (["--target", "v5e", "--target", "v6e"], "several of them need --search"),
        (["--target", "v5e", "--search", "--tensor-parallel-size", "2"], "--search tries all"),
        (["--target", "v5e", "--search", "--data-parallel-experts"], "--search tries both"),
        (["--target", "v5e", "--price-per-chip-hour", "1", "--price-per-chip-hour", "2"], "give it once"),
        (["--target", "v5e", "--search", "--save", "x"], "keeps one layout's programs"),
    ],
)
def test_usage(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "model", *flags])
    assert message in capsys.readouterr().err


def test_a_missing_compiler_is_named(
    model: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: Target) -> list[Any]:
        raise ImportError("no libtpu")

    monkeypatch.setattr(Target, "_tpu_devices", missing)
    assert main(["plan", model(), "--target", "v5e"]) == 1
    assert (
        "no libtpu; for the compilers in the clone of jaxllm run pip install -e '.[plan]'"
        in capsys.readouterr().err
    )


def test_what_is_refused_in_python(model: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"architectures=\['MambaForCausalLM'\]: none of them is supported"):
        Engine.plan(model(architectures=["MambaForCausalLM"]), "v5e", few_layers=True)
    with pytest.raises(ValueError, match="price_per_chip_hour=0: must be above 0"):
        Engine.plan(model(), "v5e", price_per_chip_hour=0)
    with pytest.raises(TypeError, match="seed: no option of plans; there are"):
        Engine.plan(model(), "v5e", seed=1)


@pytest.mark.usefixtures("steps")
def test_copies_of_experts_are_weights(model: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of 8 experts on 4 chips each has 2, and with 4 copies 3."""
    mixtral = model(architectures=["MixtralForCausalLM"], num_key_value_heads=4, num_attention_heads=4)
    arguments = ["plan", mixtral, "--target", "v5e:2x2", "--expert-parallel-size", "4", "--json", *SMALL]
    weights = []
    for copies in ([], ["--enable-eplb"], ["--enable-eplb", "--num-redundant-experts", "4"]):
        assert main([*arguments, *copies]) == 0
        [stage] = json.loads(capsys.readouterr().out)["stages"]
        memory = stage["memory"]
        weights.append(memory["weights"])
    layers, embed, mlp = (CONFIG[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    without, alone, copied = weights
    assert alone - without == layers * 8 * 4  # a table of 8 places
    expert = 3 * embed * mlp * 2
    assert copied - alone == layers * (expert + 3 * 8 * 4)
    assert memory["temporaries"] >= (3 + 3) * expert * 2 // 3  # to move gate and up from slot to slot
