"""Searches a backend's blocks on the device present, comparing results and times with the default's."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pallas_kernels.bench import Workload
from pallas_kernels.registry import function_of
from pallas_kernels.timing import Effort, memory_budget, time_step
from pallas_kernels.tuning import Blocks, Key, Tunable

TOLERANCE = 2e-2
"""Of results that are to be the same, in bfloat16 and summed in another order, relative to the largest."""
WORTH = 0.02
"""Blocks that gain less than this over the default are noise, and not kept."""


@dataclass(frozen=True)
class Found:
    """The fastest blocks for a key.

    Attributes:
        blocks: None: none was faster than the default.
        gain: the default's time over theirs, the geometric mean over the workloads.
        tried, wrong, refused: how many were timed; gave another result; did not compile or fit.
    """

    key: Key
    blocks: Blocks | None
    gain: float
    tried: int
    wrong: int
    refused: int


def search(
    backend: Any, workloads: list[Workload], effort: Effort, most: int | None, report: Callable[[str], None]
) -> Iterator[Found]:
    """For each kind of workload the fastest of the blocks that its backend offers.

    Args:
        backend: its attribute `tunable` says what can be chosen.
        most: copies of a workload.
        report: is told of each set of blocks.
    """
    tunable: Tunable = backend.tunable
    for key, group in _by_key(tunable, backend, workloads):
        defaults = [_run(one, backend, function_of(backend), effort, most) for one in group]
        best, gain, counts = None, 1.0 + WORTH, dict.fromkeys(("tried", "wrong", "refused"), 0)
        for blocks in tunable.candidates(group[0].problem, group[0].phase):
            function = tunable.bind(group[0].phase, blocks)
            try:
                gains = [
                    _compare(default, _run(one, backend, function, effort, most))
                    for one, default in zip(group, defaults, strict=True)
                ]
            except AssertionError as error:
                counts["wrong"] += 1
                report(f"{blocks}: {error}")
                continue
            except Exception as error:  # whatever a compiler says about blocks that are too large for it
                counts["refused"] += 1
                report(
                    f"{blocks}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
                continue
            counts["tried"] += 1
            mean = math.exp(sum(map(math.log, gains)) / len(gains))
            report(f"{blocks}: {mean:.3f} times the default's speed")
            if mean > gain:
                best, gain = blocks, mean
        yield Found(key, best, gain if best else 1.0, **counts)


def _by_key(
    tunable: Tunable, backend: Any, workloads: list[Workload]
) -> Iterator[tuple[dict[str, str | int], list[Workload]]]:
    """Workloads that the backend serves, those together that one set of blocks is for."""
    groups: dict[str, tuple[dict[str, str | int], list[Workload]]] = {}
    for one in workloads:
        if one.phase not in tunable.values:
            continue
        try:
            backend.require(one.problem)
        except NotImplementedError:
            continue
        key: dict[str, str | int] = {"phase": one.phase, **tunable.key(one.problem)}
        groups.setdefault(repr(sorted(key.items())), (key, []))[1].append(one)
    yield from groups.values()


def _run(
    workload: Workload, backend: Any, function: Callable[..., Any], effort: Effort, most: int | None
) -> tuple[float, np.ndarray]:
    """Seconds of a step, and the output of the first one."""
    prepared = workload.prepare(backend, function, workload.copies(memory_budget(), most))
    carry = prepared.step(prepared.carry)
    out = np.asarray(jax.tree.leaves(carry)[0], np.float32)
    seconds, _ = time_step(prepared.step, carry, effort)
    return seconds, out


def _compare(default: tuple[float, np.ndarray], other: tuple[float, np.ndarray]) -> float:
    """How many times as fast as the default.

    Raises:
        AssertionError: the result is another.
    """
    (seconds, out), (taken, found) = default, other
    error = np.abs(found - out).max() / max(float(np.abs(out).max()), 1e-30)
    if not error <= TOLERANCE:  # NaN is not
        raise AssertionError(f"another result than the default's, off by {error:.3g} of the largest")
    return seconds / taken
