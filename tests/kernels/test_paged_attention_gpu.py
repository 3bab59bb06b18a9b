"""The Hopper kernels in Mosaic GPU's interpreter, races on; `mosaic_gpu_shim` says what it cannot show."""

import dataclasses
from functools import partial
from typing import Any

import jax
import mosaic_gpu_shim
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.paged_attention import gpu
from pallas_kernels.paged_attention.cases import Case
from pallas_kernels.paged_attention.check import check_case
from pallas_kernels.paged_attention.gpu_plan import Plan


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Any:
    mosaic_gpu_shim.install(monkeypatch)
    jax.config.update("jax_disable_most_optimizations", True)  # the interpreter compiles a lot
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    reset_gpu_interpret_mode_state()


def run(case: Case, capfd: Any, **plans: Plan) -> None:
    function = partial(gpu.paged_attention_gpu, interpret=InterpretGPUParams(detect_races=True), **plans)
    check_case(case, gpu.BACKEND, function)
    assert "RACE DETECTED" not in capfd.readouterr().out
    assert not mosaic_gpu_shim.races_found()


SINGLES = Plan(1, 1, 64, 2, 0, 2, 1)
"""Two splits, in one thread block: barriers go through several phases."""

CASES = {
    "decode": Case(rows=((1, 13), (1, 200)), page_size=32),
    "window, cap, sinks": Case(
        rows=((1, 30), (1, 200)), page_size=32, sliding_window=70, soft_cap=3.0, sinks=True
    ),
    "int8": Case(rows=((1, 13), (1, 90)), page_size=32, page_dtype="int8", scales=True),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_rows_of_one_token(name: str, capfd: Any) -> None:
    case = dataclasses.replace(CASES[name], dtype="bfloat16", padding_tokens=0, padding_rows=0, kv_heads=1)
    plan = dataclasses.replace(SINGLES, raw_stages=1 if case.page_dtype else 0)
    run(case, capfd, singles=plan, ragged=plan)


def test_one_row(capfd: Any) -> None:
    case = Case(
        rows=((1, 300),), page_size=32, dtype="bfloat16", padding_tokens=0, padding_rows=0, kv_heads=1
    )
    run(case, capfd, singles=SINGLES)


@pytest.mark.interpret
def test_two_warpgroups(capfd: Any) -> None:
    """More tokens than a tile has, after a row of one token; a window that ends within a page."""
    case = Case(rows=((1, 30), (40, 150)), page_size=32, sliding_window=70, dtype="bfloat16", kv_heads=1)
    run(case, capfd, singles=SINGLES, ragged=Plan(2, 32, 64, 2, 0, 1, 1))
