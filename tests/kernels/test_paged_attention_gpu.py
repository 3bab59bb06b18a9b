"""The Hopper kernels in Mosaic GPU's interpreter, races on; `mosaic_gpu_shim` says what it cannot show."""

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
import mosaic_gpu_shim
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels import hopper, tuning
from pallas_kernels.paged_attention import gpu
from pallas_kernels.paged_attention.cases import KEYS_AND_VALUES, Case
from pallas_kernels.paged_attention.check import check_case, problem_of
from pallas_kernels.paged_attention.gpu_plan import Geometry, Plan, plan_ragged, plan_singles, tuning_key
from pallas_kernels.paged_attention.problem import Problem

pytestmark = pytest.mark.timeout(200, method="thread")
"""A kernel that waits for ever waits in compiled code, where a signal is not heard."""
H100 = "NVIDIA H100 80GB HBM3"
BFLOAT16 = jnp.dtype(jnp.bfloat16)


def run(case: Case, capfd: Any, **plans: Plan) -> None:
    function = partial(gpu.paged_attention_gpu, interpret=InterpretGPUParams(detect_races=True), **plans)
    check_case(case, gpu.BACKEND, function)
    mosaic_gpu_shim.assert_no_races(capfd)


def geometry_of(case: Case) -> Geometry:
    group = case.heads // case.kv_heads
    return Geometry(
        group, case.kv_heads, case.head_dim, case.page_size, BFLOAT16, jnp.dtype(case.stored_dtype)
    )


def short_plans(case: Case) -> dict[str, Plan]:
    """The default ones, in one thread block of few stages: barriers go through several phases."""
    geometry, rows = geometry_of(case), len(case.rows) + case.padding_rows
    tokens = max(1, sum(new for new, _ in case.rows) + case.padding_tokens)
    keys = max((keys for _, keys in case.rows), default=1)
    plans = {
        "singles": plan_singles(min(tokens, max(1, rows)), keys, geometry),
        "ragged": plan_ragged(tokens, keys, geometry),
    }
    return {
        name: dataclasses.replace(
            plan,
            stages=min(plan.stages, 2),
            raw_stages=min(plan.raw_stages, 2),
            splits=min(plan.splits, 2),
            blocks=1,
        )
        for name, plan in plans.items()
    }


def served() -> dict[str, Case]:
    """The op's cases in bfloat16, as far as the kernels take their shapes."""
    cases = {}
    for name, case in KEYS_AND_VALUES.items():
        if case.dtype == "float32" and case.page_dtype == "bfloat16":
            continue  # in bfloat16 it is "mixed"
        case = dataclasses.replace(case, dtype="bfloat16")
        try:
            gpu.require(problem_of(case, "gpu", H100))
        except NotImplementedError:
            continue
        cases[name] = case
    return cases


BF16_CORNERS = served()

EXTRA = {
    "long decode": Case(rows=((1, 13), (1, 400)), page_size=32),
    "long window": Case(rows=((1, 30), (1, 400)), page_size=32, sliding_window=170, soft_cap=3.0, sinks=True),
    "long int8": Case(rows=((1, 13), (1, 300)), page_size=32, page_dtype="int8", scales=True),
    "float8, window": Case(
        rows=((1, 300), (90, 310)), page_size=16, sliding_window=100, page_dtype="float8_e4m3fn"
    ),
    "two warpgroups of a window": Case(
        rows=((1, 30), (100, 150)), page_size=32, sliding_window=70, sinks=True
    ),
}
"""Where blocks of keys are many enough to use each stage again."""


def test_one_row(interpreter: None, capfd: Any) -> None:
    case = Case(
        rows=((1, 300),), page_size=32, dtype="bfloat16", padding_tokens=0, padding_rows=0, kv_heads=1
    )
    run(case, capfd, singles=Plan(1, 1, 64, 2, 0, 2, 1))


def test_wide_heads(interpreter: None, capfd: Any) -> None:
    """Two warpgroups on the same rows, with and without splits; a stage is filled again."""
    case = Case(
        rows=((1, 70), (4, 20)), page_size=32, dtype="bfloat16", padding_tokens=0, padding_rows=0, kv_heads=1,
        head_dim=256, sliding_window=50,
    )  # fmt: skip
    run(case, capfd, singles=Plan(2, 1, 64, 1, 0, 2, 1, 2), ragged=Plan(2, 32, 64, 1, 0, 1, 1, 2))


@pytest.mark.interpret
@pytest.mark.parametrize("name", BF16_CORNERS)
def test_corners(name: str, interpreter: None, capfd: Any) -> None:
    case = BF16_CORNERS[name]
    run(case, capfd, **short_plans(case))


@pytest.mark.interpret
@pytest.mark.parametrize("name", EXTRA)
def test_many_blocks(name: str, interpreter: None, capfd: Any) -> None:
    case = dataclasses.replace(EXTRA[name], dtype="bfloat16", kv_heads=1)
    run(case, capfd, **short_plans(case))


@pytest.mark.interpret
@pytest.mark.parametrize("page_size", [8, 64])
def test_pages_of_8_bits(page_size: int, interpreter: None, capfd: Any) -> None:
    case = Case(
        rows=((1, 130), (5, 33)), page_size=page_size, kv_heads=1, dtype="bfloat16",
        page_dtype="float8_e4m3fn", scales=True,
    )  # fmt: skip
    run(case, capfd, **short_plans(case))


SERVED = problem_of(Case(rows=(), dtype="bfloat16"), "gpu", H100)


def change(**changes: Any) -> Problem:
    """A problem that is served but for these; those of the pages by their names, too."""
    of_pages = {name: changes.pop(name) for name in ("page_size", "head_dim", "kv_heads") if name in changes}
    if "pages" in changes:
        of_pages["dtype"] = jnp.dtype(changes.pop("pages"))
    geometry = dataclasses.replace(SERVED.geometry, **of_pages)
    return dataclasses.replace(SERVED, geometry=geometry, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        *({"device_kind": f"NVIDIA {name}"} for name in ("H100 80GB HBM3", "H200", "GH200 480GB", "H20")),
        *({"page_size": size} for size in (8, 16, 32, 64, 128)),
        *({"head_dim": dim} for dim in (16, 64, 80, 96, 128, 256)),
        *({"pages": name, "head_dim": 96} for name in ("bfloat16", "int8", "float8_e4m3fn")),
        {"heads": 64, "kv_heads": 1},
        {"sliding_window": 3, "soft_cap": 2.0, "sinks": True},
    ],
    ids=str,
)
def test_what_is_served(changes: dict[str, Any]) -> None:
    gpu.require(change(**changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "cpu", "device_kind": "cpu"}, "cpu: only Hopper"),
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "A100.*only Hopper"),
        ({"device_kind": "NVIDIA B200"}, "B200: only Hopper"),
        ({"dtype": jnp.dtype(jnp.float32)}, "dtype=float32"),
        ({"dtype": jnp.dtype(jnp.float16)}, "dtype=float16"),
        ({"pages": "float32"}, "pages of float32"),
        ({"pages": "float8_e5m2"}, "pages of float8_e5m2"),
        ({"page_size": 1}, "page_size=1:"),
        ({"page_size": 24}, "page_size=24:"),
        ({"page_size": 256}, "page_size=256:"),
        ({"head_dim": 512}, "head_dim=512: only up to 256"),
        ({"head_dim": 72}, "head_dim=72 in bfloat16"),
        ({"head_dim": 80, "pages": "int8"}, "head_dim=80 in int8"),
        ({"heads": 65, "kv_heads": 1}, "65 heads over 1 kv heads"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        gpu.require(change(**changes))


@pytest.mark.parametrize("version", [12080, 12081, 12090])
def test_compilers_that_are_wrong(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "cuda_version", lambda: version)
    with pytest.raises(NotImplementedError, match=rf"CUDA {version}.*12\.9\.1"):
        gpu.require(SERVED)


@pytest.mark.parametrize("version", [None, 12060, 12091, 13000])
def test_compilers_that_are_right(version: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "cuda_version", lambda: version)
    gpu.require(SERVED)


def write_tuning(monkeypatch: pytest.MonkeyPatch, phase: str, blocks: dict[str, int]) -> Geometry:
    geometry = geometry_of(Case(rows=(), dtype="bfloat16", head_dim=128))
    entry = {"key": {"phase": phase, **tuning_key(geometry)}, "blocks": blocks, "measured": {}}
    monkeypatch.setattr(tuning, "_read", lambda op: {"gpu": {H100: [entry]}})
    return geometry


def test_tuned_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = write_tuning(monkeypatch, "decode", {"block": 128, "stages": 2})
    plan = plan_singles(4, 4096, geometry, H100)
    assert (plan.block, plan.stages, plan.splits) == (128, 2, 16)
    assert plan_singles(4, 4096, geometry, "NVIDIA H200").block == 64
    assert plan_ragged(4, 4096, geometry, H100).block == 64


def test_tuned_blocks_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With splits only two stages of 128 keys fit beside the results."""
    geometry = write_tuning(monkeypatch, "prefill", {"block": 128, "stages": 4})
    assert plan_ragged(64, 4096, geometry, H100).stages == 2


def test_tuned_blocks_that_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = write_tuning(monkeypatch, "prefill", {"block": 96, "stages": 2})
    with pytest.raises(ValueError, match="block=96: may be 64, 128"):
        plan_ragged(64, 4096, geometry, H100)
