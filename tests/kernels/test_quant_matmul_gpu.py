"""The Hopper product in Mosaic GPU's interpreter, races on; `mosaic_gpu_shim` says what it cannot show."""

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
import mosaic_gpu_shim
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels import tuning
from pallas_kernels.hopper import RESERVED, SHARED_MEMORY
from pallas_kernels.quant_matmul import Problem, gpu
from pallas_kernels.quant_matmul.cases import CORNERS, Case
from pallas_kernels.quant_matmul.check import check_case, problem_of
from pallas_kernels.quant_matmul.gpu_plan import Plan, fit, make_plan, weights_of

pytestmark = pytest.mark.timeout(200, method="thread")
"""A kernel that waits for ever waits in compiled code, where a signal is not heard."""
H100 = "NVIDIA H100 80GB HBM3"


def run(case: Case, capfd: Any, plan: Plan | None = None) -> None:
    interpret = InterpretGPUParams(detect_races=True)
    check_case(case, partial(gpu.quant_matmul_gpu, plan=plan, interpret=interpret))
    mosaic_gpu_shim.assert_no_races(capfd)


def served() -> dict[str, Case]:
    """The op's cases in bfloat16, as far as the kernel takes their sizes."""
    cases = {}
    for name, case in CORNERS.items():
        if f"{name}, bfloat16" in CORNERS:
            continue
        case = dataclasses.replace(case, dtype="bfloat16")
        try:
            gpu.require(problem_of(case, "gpu", H100))
        except NotImplementedError:
            continue
        cases[name] = case
    return cases


SERVED = served()
SMALL = {"tokens": 130, "inputs": 768}
"""In place of sizes that take the interpreter minutes."""


def test_few_tokens(interpreter: None, capfd: Any) -> None:
    """One stage, so that it is filled again."""
    case = Case("int4", inputs=256, outputs=128, block=(32, 1), zero=True, dtype="bfloat16")
    run(case, capfd, Plan(tokens=32, warpgroups=2, stages=1, splits=1))


def test_results_in_parts(interpreter: None, capfd: Any) -> None:
    """More tokens than are stored at a time."""
    case = Case("int8", tokens=100, inputs=128, outputs=128, dtype="bfloat16", out_dtype="bfloat16")
    run(case, capfd, Plan(tokens=128, warpgroups=2, stages=2, splits=1))


def test_splits(interpreter: None, capfd: Any) -> None:
    case = Case("int8", tokens=9, inputs=384, outputs=128, dtype="bfloat16", out_dtype="bfloat16")
    run(case, capfd, Plan(tokens=8, warpgroups=2, stages=2, splits=2))


@pytest.mark.interpret
@pytest.mark.parametrize("name", SERVED)
def test_corners(name: str, interpreter: None, capfd: Any) -> None:
    case = SERVED[name]
    run(dataclasses.replace(case, **SMALL) if case.tokens > SMALL["tokens"] else case, capfd)


LLAMA = Problem("gpu", H100, 16, 4096, 14336, jnp.dtype(jnp.bfloat16), "int8", 4096)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device_kind": "NVIDIA H200"},
        *(
            {"kind": kind, "scale_rows": rows}
            for kind in ("int4", "int8")
            for rows in (32, 64, 128, 256, 4096)
        ),
        {"kind": "fp8", "scale_rows": 128, "activation": "fp8"},
        {"kind": "int4", "zero": True},
        {"inputs": 128, "outputs": 128},
    ],
    ids=str,
)
def test_what_is_served(changes: dict[str, Any]) -> None:
    problem = dataclasses.replace(LLAMA, **changes)
    gpu.require(problem)
    weights = weights_of(problem)
    for tokens in (1, 16, 33, 64, 100, 256, 8192):
        for out_itemsize in (2, 4):
            plan = make_plan(dataclasses.replace(problem, tokens=tokens), weights, out_itemsize)
            assert plan.shared_memory(weights, out_itemsize) <= SHARED_MEMORY - RESERVED
            assert plan.stages >= 2
            assert problem.outputs % plan.outputs == 0
            assert plan.splits <= problem.inputs // 128


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "cpu", "device_kind": "cpu"}, "cpu: only Hopper"),
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "A100.*only Hopper"),
        ({"dtype": jnp.dtype(jnp.float32)}, "x of float32"),
        ({"inputs": 4096 + 64}, r"\[4160, 14336\]: .* multiples of 128"),
        ({"outputs": 200}, r"\[4096, 200\]: .* multiples of 128"),
        ({"scale_rows": 16}, "a scale for each 16 of 4096"),
        ({"scale_rows": 96}, "a scale for each 96 of 4096"),
        ({"scale_rows": 384}, "a scale for each 384 of 4096"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        gpu.require(dataclasses.replace(LLAMA, **changes))


@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 4096), (14336, 4096), (4096, 14336), (4096, 6144)])
def test_one_token_keeps_the_card_busy(inputs: int, outputs: int) -> None:
    problem = dataclasses.replace(LLAMA, tokens=1, inputs=inputs, outputs=outputs)
    plan = make_plan(problem, weights_of(problem), 2)
    assert 100 <= outputs // plan.outputs * plan.splits <= 132


def test_tuned_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {
        "key": {"phase": "few", **LLAMA.tuning_key},
        "blocks": {"warpgroups": 2, "stages": 3},
        "measured": {},
    }
    monkeypatch.setattr(tuning, "_read", lambda op: {"gpu": {H100: [entry]}})
    weights = weights_of(LLAMA)
    assert make_plan(LLAMA, weights, 2) == fit(LLAMA, weights, 2, entry["blocks"])
    assert make_plan(LLAMA, weights, 2).warpgroups == 2
    other = dataclasses.replace(LLAMA, device_kind="NVIDIA H200")
    assert make_plan(other, weights, 2).warpgroups == 4
    many = dataclasses.replace(LLAMA, tokens=2048)
    assert make_plan(many, weights, 2).stages != 3


def test_blocks_that_cannot_be_had() -> None:
    """Four warpgroups would not have the registers that many tokens take."""
    problem = dataclasses.replace(LLAMA, tokens=64)
    plan = fit(problem, weights_of(problem), 2, {"warpgroups": 4, "stages": 2})
    assert (plan.warpgroups, plan.stages) == (2, 2)
