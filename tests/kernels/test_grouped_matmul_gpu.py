"""Hopper's grouped product in Mosaic GPU's interpreter, races on; `mosaic_gpu_shim` says what it lacks."""

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
import mosaic_gpu_shim
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.grouped_matmul import Problem, choose_backend, gpu, gpu_kernel
from pallas_kernels.grouped_matmul.cases import CORNERS, Case
from pallas_kernels.grouped_matmul.check import check_case, problem_of
from pallas_kernels.grouped_matmul.gpu_plan import Plan, fit, make_plan
from pallas_kernels.grouped_matmul.tiles import cut_tiles
from pallas_kernels.hopper import RESERVED, SHARED_MEMORY

pytestmark = pytest.mark.timeout(200, method="thread")
"""A kernel that waits for ever waits in compiled code, where a signal is not heard."""
H100 = "NVIDIA H100 80GB HBM3"
SMALL = Plan(rows=8, warpgroups=2, stages=2, blocks=2)


def served() -> dict[str, Case]:
    """The op's cases in bfloat16, as far as the kernel takes their sizes."""
    cases = {}
    for name, case in CORNERS.items():
        try:
            gpu.require(problem_of(case, "gpu", H100))
        except NotImplementedError:
            continue
        cases[name] = case
    return cases


SERVED = served()


def run(case: Case, capfd: Any, plan: Plan | None = None) -> None:
    """Beyond the edges of an array the interpreter reads zeros, as the copy engine does."""
    params = InterpretGPUParams(
        detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
    )
    check_case(case, partial(gpu.grouped_matmul_gpu, plan=plan, interpret=params))
    mosaic_gpu_shim.assert_no_races(capfd)


def test_edges_everywhere(interpreter: None, capfd: Any) -> None:
    """Groups that are empty, end within a tile and take several; inputs and outputs that no tile divides."""
    case = Case((5, 0, 12), padding=3, inputs=136, outputs=160, dtype="bfloat16")
    run(case, capfd, SMALL)


@pytest.mark.interpret
@pytest.mark.parametrize("name", SERVED)
def test_corners(name: str, interpreter: None, capfd: Any) -> None:
    """With few thread blocks, each of which has several tiles, and few stages, which are filled again."""
    case = SERVED[name]
    plan = make_plan(problem_of(case, "gpu", H100))
    run(case, capfd, dataclasses.replace(plan, blocks=2, stages=2))


@pytest.mark.interpret
@pytest.mark.parametrize("changes", [{"rows": 128}, {"warpgroups": 4}, {"stages": 4, "blocks": 3}], ids=str)
def test_other_plans(changes: dict[str, int], interpreter: None, capfd: Any) -> None:
    """More rows than are stored at a time, more warpgroups, more stages than steps."""
    case = Case((9, 0, 130), padding=2, outputs=256, dtype="bfloat16", out_dtype="bfloat16")
    run(case, capfd, dataclasses.replace(SMALL, **changes))


def test_a_stage_given_back_too_early(interpreter: None, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted race: the only stage is called empty ahead of the products that read it."""
    run_kernel, multiply, arrive = gpu_kernel._run, plgpu.wgmma, plgpu.barrier_arrive
    seen: list[Any] = []

    def early(*operands: Any) -> None:
        arrive(seen[0].empty.at[0])
        multiply(*operands)

    monkeypatch.setattr(gpu_kernel, "_run", lambda refs, *rest: (seen.append(refs), run_kernel(refs, *rest)))
    monkeypatch.setattr(plgpu, "wgmma", early)
    monkeypatch.setattr(plgpu, "barrier_arrive", lambda barrier: None)
    with pytest.raises(AssertionError):
        run(Case((3,), dtype="bfloat16"), capfd, dataclasses.replace(SMALL, stages=1, blocks=1))
    assert mosaic_gpu_shim.races_found()


def test_weights_of_another_group(interpreter: None, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: all tiles are multiplied with the weights of the first."""
    copy = gpu_kernel._Part._copy

    def wrong(part: Any, stage: Any, group: Any, *place: Any) -> None:
        copy(part, stage, group * 0, *place)

    monkeypatch.setattr(gpu_kernel._Part, "_copy", wrong)
    with pytest.raises(AssertionError, match="row 2"):
        run(Case((2, 1), inputs=64, dtype="bfloat16"), capfd, SMALL)


QWEN = Problem(
    "gpu",
    H100,
    512,
    128,
    4096,
    3072,
    jnp.dtype(jnp.bfloat16),
    jnp.dtype(jnp.bfloat16),
    jnp.dtype(jnp.float32),
)


@pytest.mark.parametrize(
    "changes",
    [{}, {"device_kind": "NVIDIA H200"}, {"inputs": 2880, "outputs": 1440}, {"inputs": 720, "outputs": 2880},
     {"out_dtype": jnp.dtype(jnp.bfloat16)}, {"groups": 1}],
    ids=str,
)  # fmt: skip
def test_what_is_served(changes: dict[str, Any]) -> None:
    problem = dataclasses.replace(QWEN, **changes)
    assert choose_backend("auto", problem).backend.name == "gpu"
    for tokens in (1, 64, 512, 4096, 65536, 1 << 20):
        plan = make_plan(dataclasses.replace(problem, tokens=tokens))
        assert plan.shared_memory(problem.out_dtype.itemsize) <= SHARED_MEMORY - RESERVED
        assert plan.stages >= 3
        columns = plan.columns(problem.outputs)
        assert columns % plan.panel(columns) == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "A100.*only Hopper"),
        ({"dtype": jnp.dtype(jnp.float32)}, "x of float32"),
        ({"weight_dtype": jnp.dtype(jnp.float32)}, "weights of float32"),
        ({"out_dtype": jnp.dtype(jnp.float16)}, "out of float16"),
        ({"inputs": 100}, r"\[100, 3072\]: .* multiples of \[8, 16\]"),
        ({"outputs": 1432}, r"\[4096, 1432\]: .* multiples of \[8, 16\]"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], reason: str) -> None:
    """XLA serves it in place of the kernel."""
    problem = dataclasses.replace(QWEN, **changes)
    with pytest.raises(NotImplementedError, match=reason):
        gpu.require(problem)
    assert choose_backend("auto", problem).backend.name == "xla"


def test_tiles_fit_groups() -> None:
    """Most groups of a decode step take one tile; those of a prompt fill theirs."""
    rows = {tokens: make_plan(dataclasses.replace(QWEN, tokens=tokens)).rows for tokens in (8, 512, 16384)}
    assert rows == {8: 8, 512: 8, 16384: 128}


def test_tuned_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {"rows": 16, "warpgroups": 4, "stages": 4}
    entry = {"key": {"phase": "product", **QWEN.tuning_key}, "blocks": blocks, "measured": {}}
    monkeypatch.setattr(tuning, "_read", lambda op: {"gpu": {H100: [entry]}})
    assert make_plan(QWEN) == Plan(**blocks)
    assert make_plan(dataclasses.replace(QWEN, device_kind="NVIDIA H200")).warpgroups == 2


def test_blocks_that_cannot_be_had() -> None:
    """Four warpgroups would not have the registers that many rows take, nor as many stages the memory."""
    plan = fit(QWEN, {"rows": 128, "warpgroups": 4, "stages": 8})
    assert (plan.warpgroups, plan.stages) == (2, 5)


@pytest.mark.parametrize("name", ["groups that meet within a tile", "more groups than rows"])
def test_rows_come_back_from_their_tiles(name: str) -> None:
    sizes, tokens = jnp.asarray(CORNERS[name].sizes), CORNERS[name].tokens
    tiles = cut_tiles(sizes, tokens, 8, aligned=False)
    places = np.asarray(gpu.tile_places(sizes, tokens, 8))[: sum(CORNERS[name].sizes)]
    taken = np.asarray(tiles.start[:, None] + jnp.arange(8)).reshape(-1)
    np.testing.assert_array_equal(taken[places], np.arange(len(places)))
    np.testing.assert_array_equal(
        np.asarray(tiles.group)[places // 8], np.repeat(np.arange(len(sizes)), sizes)
    )
