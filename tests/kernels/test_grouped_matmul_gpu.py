"""The Hopper grouped product in Mosaic GPU's interpreter, races on; `mosaic_gpu_shim` says what it cannot show."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mosaic_gpu_shim
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.grouped_matmul import Problem, choose_backend, gpu
from pallas_kernels.grouped_matmul.cases import CORNERS, Case
from pallas_kernels.grouped_matmul.check import check_case, problem_of
from pallas_kernels.grouped_matmul.gpu_plan import TUNABLE, Plan, fit, make_plan
from pallas_kernels.grouped_matmul.tiles import cut_tiles
from pallas_kernels.hopper import RESERVED, SHARED_MEMORY

pytestmark = pytest.mark.timeout(200, method="thread")
"""A kernel that waits for ever waits in compiled code, where a signal is not heard."""
H100 = "NVIDIA H100 80GB HBM3"
SMALL = Plan(rows=8, warpgroups=2, stages=2, blocks=2)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Any:
    mosaic_gpu_shim.install(monkeypatch)
    jax.config.update("jax_disable_most_optimizations", True)  # the interpreter compiles a lot
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    reset_gpu_interpret_mode_state()


def run(case: Case, capfd: Any, plan: Plan | None = None, **options: Any) -> None:
    interpret = InterpretGPUParams(detect_races=True, **options)
    check_case(case, partial(gpu.grouped_matmul_gpu, plan=plan, interpret=interpret))
    assert "RACE DETECTED" not in capfd.readouterr().out
    assert not mosaic_gpu_shim.races_found()


def test_a(interpreter: None, capfd: Any) -> None:
    run(Case((5, 0, 12, 1), padding=3, outputs=256, dtype="bfloat16"), capfd, SMALL, out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
