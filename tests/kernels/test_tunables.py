"""What `tune` may choose for each kernel of an accelerator, and that what it keeps reaches the kernel."""

import dataclasses
import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.bench import Options, Workload
from pallas_kernels.ops import get_op, list_ops
from pallas_kernels.quant_matmul import tpu as quant_matmul_tpu
from pallas_kernels.registry import function_of
from pallas_kernels.timing import Effort
from pallas_kernels.tune import search
from pallas_kernels.tuning import Tunable

KINDS = {"tpu": "TPU v5 lite", "gpu": "NVIDIA H100 80GB HBM3"}
KERNELS = [
    ("paged_attention", "tpu"),
    ("paged_attention", "gpu"),
    ("quant_matmul", "tpu"),
    ("quant_matmul", "gpu"),
    ("grouped_matmul", "tpu"),
    ("grouped_matmul", "gpu"),
]
LARGE = Options(rows=(8, 256), context=(1024,), chunk=(2048,), page_size=32)
SMALL = Options("small-moe", rows=(8, 256), context=(512,), chunk=(512,), page_size=32)


def served(op: str, name: str, options: Options) -> Iterator[tuple[Any, Workload]]:
    """A workload of each phase that the backend serves, and the backend."""
    backend, seen = get_op(op).registry.get(name), set()
    for one in get_op(op).workloads(name, KINDS[name], options):
        if one.phase not in seen:
            backend.require(one.problem)
            seen.add(one.phase)
            yield backend, one


def test_all_kernels_are_listed() -> None:
    having = {(op, name) for op in list_ops() for name in KINDS if name in get_op(op).registry.names()}
    assert having == set(KERNELS)


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_there_is_something_to_choose(op: str, name: str) -> None:
    hash(get_op(op).registry.get(name))  # static arguments of jitted functions are
    for backend, one in served(op, name, LARGE):
        candidates = list(backend.tunable.candidates(one.problem, one.phase))
        assert 4 <= len(candidates) <= 200, one.name
        assert {one.phase for _, one in served(op, name, LARGE)} == set(backend.tunable.values)


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_an_entry_changes_the_kernel(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traced program is another one with some of the blocks; those of another chip change nothing."""
    module = importlib.import_module(f"pallas_kernels.{op}.{name}")
    monkeypatch.setattr(module, "current_device", lambda: (name, KINDS[name]))
    for backend, one in served(op, name, SMALL):

        def trace(chip: str, *entries: dict[str, Any], backend: Any = backend, one: Workload = one) -> str:
            monkeypatch.setattr(tuning, "_read", lambda op: {name: {chip: list(entries)}})
            prepared = one.prepare(backend, function_of(backend), 1)
            return str(jax.make_jaxpr(prepared.step)(prepared.carry))

        default = trace(KINDS[name])
        key = {"phase": one.phase, **backend.tunable.key(one.problem)}
        for blocks in list(backend.tunable.candidates(one.problem, one.phase))[::-1]:
            entry = {"key": key, "blocks": blocks, "measured": {}}
            if trace(KINDS[name], entry) != default:
                break
        else:
            pytest.fail(f"{one.name}: no blocks change anything")
        assert trace("another chip", entry) == default


def test_tuning_an_interpreted_kernel() -> None:
    """The search runs each of the blocks, and finds that their results are the default's."""
    interpreted, offered = quant_matmul_tpu.BACKEND.interpreted, quant_matmul_tpu.BACKEND.tunable
    assert interpreted is not None
    assert offered is not None
    tunable = Tunable(
        {"few": {"tokens": (128,), "inputs": (512,), "outputs": (256, 512)}},
        offered.key,
        lambda phase, blocks: partial(interpreted, blocks=blocks),
    )
    backend = dataclasses.replace(
        quant_matmul_tpu.BACKEND, multiply=interpreted, require=lambda problem: None, tunable=tunable
    )
    workloads = get_op("quant_matmul").workloads("cpu", "cpu", Options("small-moe", rows=(8,)))
    int8 = [one for one in workloads if one.problem.kind == "int8"]
    [found] = search(backend, int8, Effort(1, 0.001), 1, lambda message: None)
    assert (found.tried, found.wrong, found.refused) == (2, 0, 0)
    assert found.key == {"phase": "few", **int8[0].problem.tuning_key}
    assert int8[0].problem.dtype == jnp.bfloat16
