"""The bench commands on a tiny model: every figure is there, and adds up."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from jaxllm.bench import growth, startup
from jaxllm.bench.figures import percentile, percentiles, spread, table
from jaxllm.cli.main import main

MODEL = str(Path(__file__).parent.parent / "models" / "goldens" / "llama")
ENGINE = [
    MODEL, "--dtype", "float32", "--skip-tokenizer-init", "--page-size", "4", "--num-pages", "200",
    "--max-num-seqs", "6", "--max-num-batched-tokens", "32", "--no-compilation-cache", "--no-progress",
]  # fmt: skip
ONCE = ["--rounds", "1"]


def bench(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["bench", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([3.0], 50) == 3
    assert percentiles([]) is None
    assert spread([2.0, 4.0, 3.0], most=True)["best"] == 4
    assert spread([2.0, 4.0, 3.0], most=False) == {"best": 2, "median": 3, "all": [2, 4, 3]}


def test_figures_for_people() -> None:
    text = table(
        {
            "output_tokens_per_second": spread([1.0, 2.0], most=True),
            "n": 3,
            "best": {"ttft": None},
            "memory_bytes": {"host_peak": 1983676416},
        }
    )
    assert [line.split() for line in text.splitlines()] == [
        ["output", "tokens", "per", "second"],
        ["best", "2"],
        ["median", "1.5"],
        ["n", "3"],
        ["best", "ttft", "-"],
        ["memory", "host_peak", "1.98", "GB"],
    ]


def test_throughput(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "run.png"
    found = bench(
        capsys, "throughput", *ENGINE, "--num-prompts", "4", "--input-len", "10", "--output-len", "5",
        "--rounds", "2", *(["--plot", str(picture)] if _has_matplotlib() else []),
    )  # fmt: skip
    best = found["best_round"]
    assert (best["requests"], best["prompt_tokens"], best["output_tokens"]) == (4, 40, 20)
    assert best["output_tokens_per_second"] == pytest.approx(20 / best["seconds"])
    assert best["output_tokens_per_second"] == found["output_tokens_per_second"]["best"]
    assert best["total_tokens_per_second"] == pytest.approx(60 / best["seconds"])
    assert len(found["total_tokens_per_second"]["all"]) == 2
    assert best["tokens_per_step"] * best["steps"] == pytest.approx(40 + 4 * 4)
    assert best["ttft_seconds"]["p50"] <= best["ttft_seconds"]["p99"] <= best["e2e_seconds"]["p99"]
    assert 0 < best["itl_seconds"]["p50"] <= best["seconds"]
    parts = best["step_seconds"]
    work = ("schedule", "pack", "dispatch", "process")
    assert parts["host"]["mean"] == pytest.approx(sum(parts[part]["mean"] for part in work))
    assert parts["device"]["mean"] > 0
    assert 4 * 3 <= best["pages_used_peak"] <= 4 * 4
    assert 0 < best["page_waste"] < 0.5
    engine = found["engine"]
    assert (engine["pages"], engine["programs_compiled_late"]) == (200, 0)
    memory = engine["memory_bytes"]
    assert memory["host_peak"] >= memory["host_before_loading"] > 2**20
    assert min(memory["weights"], memory["pages"], memory["rows"]) > 0
    own = memory["weights"] + memory["pages"] + memory["rows"]
    assert memory["host_peak"] == own + memory["host_besides"]
    assert picture.exists() == _has_matplotlib()


def test_a_dataset_that_arrives(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt_token_ids": [1, 2, 3], "output_len": 2}\n{"prompt_token_ids": [4]}\n')
    found = bench(
        capsys, "throughput", *ENGINE, "--dataset", str(file), "--output-len", "3", "--request-rate", "20",
        "--rounds", "1",
    )  # fmt: skip
    best = found["best_round"]
    assert (best["prompt_tokens"], best["output_tokens"], best["requests"]) == (4, 5, 2)
    assert best["seconds"] > best["e2e_seconds"]["p50"]


def test_latency(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(
        capsys,
        "latency",
        *ENGINE,
        "--input-len",
        "9",
        "--output-len",
        "6",
        "--long-len",
        "40",
        "--rounds",
        "1",
    )
    seconds = found["whole_seconds"]["best"] - found["ttft_seconds"]["best"]
    assert found["decode_tokens_per_second"] == pytest.approx(5 / seconds)
    assert found["best_round"]["output_tokens"] == 6
    assert found["prefill_tokens_per_second"]["best"] > 0


def test_prefix_hits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxllm.bench.prefix.PEERS_SHARED_LEN", 8)
    found = bench(
        capsys,
        "prefix",
        *ENGINE,
        "--num-prompts",
        "3",
        "--shared-len",
        "64",
        "--output-len",
        "2",
        "--rounds",
        "1",
    )
    assert found["off"]["hit_ratio"] == 0
    assert 0 <= found["cold"]["hit_ratio"] < found["warm"]["hit_ratio"]
    assert found["warm"]["hit_ratio"] > 64 / (64 + 32)
    ratio = found["warm"]["total_tokens_per_second"] / found["off"]["total_tokens_per_second"]
    assert found["warm_to_off"]["total_tokens_per_second"] == pytest.approx(ratio)


def test_prefix_without_a_cache_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prefix", *ENGINE, "--enforce-eager", "--no-enable-prefix-caching"]) == 1
    assert "enable_prefix_caching=False" in capsys.readouterr().err


def test_growth(capsys: pytest.CaptureFixture[str]) -> None:
    axes = [flag for axis in ("rows", "waiting") for flag in ("--axis", axis)]
    found = bench(capsys, "growth", *ENGINE, "--most", "4", *axes)["axes"]
    assert [point["rows"] for point in found["rows"]] == [1, 2, 4]
    assert [point["waiting"] for point in found["waiting"]] == [0]
    assert all(point["step_ms"] >= point["schedule_ms"] > 0 for points in found.values() for point in points)


def test_rows_last_until_all_prompts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts of 64 tokens take 64 steps of 4 tokens, and the first row decodes beside the others'."""
    asked: list[tuple[int, int]] = []

    def lengthened(_: growth.Growth, length: int, *, num_pages: int) -> nullcontext[None]:
        asked.append((length, num_pages))
        return nullcontext()

    monkeypatch.setattr(growth.Growth, "_lengthened", lengthened)
    monkeypatch.setattr(growth, "decode", lambda *_: {})
    sizes = {"page_size": 4, "max_num_batched_tokens": 4}
    assert growth.Growth("model", sizes, most=64).context() == [{"context": 64}]
    [(length, num_pages)] = asked
    assert length >= 64 + 64 + growth.DECODE_STEPS
    assert num_pages * 4 >= growth.CONTEXT_ROWS * length


def test_the_scheduler_needs_no_jax() -> None:
    code = (
        "import sys; from jaxllm.cli.main import main;"
        "main(['bench', 'scheduler', '--steps', '9', '--waiting', '3', '--running', '2', '--json']);"
        "print('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    report, has_jax = done.stdout.splitlines()
    [point] = json.loads(report)["points"]
    assert (point["running"], point["waiting"], has_jax) == (2, 3, "False")
    assert point["step_us"] == pytest.approx(point["schedule_us"] + point["complete_us"])


def test_startup_passes_the_phases_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def python(arguments: list[str], environment: dict[str, str]) -> str:
        if arguments[0] == "-c":
            return "0.02"
        asked.append((json.loads(arguments[-1]), environment["XDG_CACHE_HOME"]))
        seconds = 10.0 / len(asked)
        return json.dumps({"seconds": seconds, "phases": {"import_jax": seconds}})

    monkeypatch.setattr(startup, "_python", python)
    found = bench(capsys, "startup", *ENGINE, "--rounds", "2", "--input-len", "8")
    assert (found["import_seconds"], found["cold_seconds"]) == (0.02, 10)
    assert found["warm_seconds"]["all"] == [5, pytest.approx(10 / 3)]
    assert found["warm"]["seconds"] == found["warm_seconds"]["best"]
    assert [request["prompt_len"] for request, _ in asked] == [8, 8, 8]
    assert len({folder for _, folder in asked}) == 1  # what the first left is there for the others
    assert asked[0][0]["options"]["compilation_cache"] is True
    assert asked[0][0]["options"]["page_size"] == 4


def test_a_picture_without_its_folder_is_refused_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scheduler", "--plot", "no/such/folder/x.png"]) == 1
    assert "no folder" in capsys.readouterr().err


def test_a_picture_without_matplotlib_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "scheduler", "--plot", "x.png"]) == 1
    assert "pip install -e '.[notebook]'" in capsys.readouterr().err


def _has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True
