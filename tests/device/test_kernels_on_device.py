"""Every op on the accelerator that is there: its cases, and its speed with the sizes of an 8B model.

    OUT=results python3 -m pytest -m device tests/device

The commands run in processes of their own, which use the device that jax finds; this one stays on the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels.ops import list_ops

ROOT = Path(__file__).parents[2]
GOALS = {"decode": 0.85, "prefill": 0.65}
"""Fractions of the measured copy bandwidth and matmul rate to reach; reported, not asserted."""

pytestmark = [pytest.mark.device, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def results() -> Path:
    """The folder that `$OUT` names."""
    folder = Path(os.environ.get("OUT", "device-results")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_command(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a command on the accelerator."""
    for_tests = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in for_tests}
    done = subprocess.run(
        [sys.executable, "-m", "pallas_kernels", *arguments, "--json"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), f"pallas_kernels {' '.join(arguments)} ended with {done.returncode}"
    report = json.loads(done.stdout)
    assert report["machine"]["platform"] != "cpu", "jax finds no accelerator here"
    return done.returncode, report


@pytest.mark.parametrize("op", list_ops())
def test_cases(op: str, results: Path) -> None:
    code, report = run_command("check", "--op", op)
    (results / f"check-{op}.json").write_text(json.dumps(report, indent=1) + "\n")
    failed = [
        f"{one['backend']}, {case['case']}: {case['detail']}"
        for one in report["backends"]
        for case in one["cases"]
        if case["status"] == "failed"
    ]
    assert not failed
    assert code == 0
    assert any(one["passed"] for one in report["backends"])


@pytest.mark.parametrize("page_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_attention_speed(page_dtype: str, results: Path) -> None:
    folder = results / f"paged_attention-{page_dtype}"
    _, report = run_command(
        "bench", "--op", "paged_attention", "--model", "llama-3-8b", "--page-dtype", page_dtype,
        "--rows", "1,32,128,256", "--context", "1024,8192,32768", "--output", str(folder),
    )  # fmt: skip
    lines = list(against_goals(report["measurements"]))
    (folder / "goals.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    assert_timed(report)


@pytest.mark.parametrize("op", [op for op in list_ops() if op != "paged_attention"])
def test_product_speed(op: str, results: Path) -> None:
    assert_timed(run_command("bench", "--op", op, "--output", str(results / op))[1])


def assert_timed(report: dict[str, Any]) -> None:
    """Whether anything was timed, and all that was not was refused for a reason."""
    assert [one for one in report["measurements"] if one["failed"]] == []
    assert any(one["seconds"] for one in report["measurements"])


def against_goals(measurements: list[dict[str, Any]]) -> list[str]:
    """A line for each measurement that there is a goal for."""
    lines = []
    for one in measurements:
        goal = GOALS[one["workload"].split()[0]]
        if one["seconds"]:
            word = "reached" if one["fraction"] >= goal else "missed"
            lines.append(
                f"- {one['backend']}, {one['workload']}: {one['fraction']:.1%} of {one['bound']}, "
                f"goal {goal:.0%} {word}"
            )
    return lines
