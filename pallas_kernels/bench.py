"""Times ops on the device present, against what the device was measured to do in the same run."""

import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax

from pallas_kernels.registry import function_of
from pallas_kernels.timing import MIB, Effort, Limits, memory_budget, time_step

CACHES = 256 * MIB
"""Copies of what is read take this much at least, so that no cache holds it until its turn comes again: an
H100 has 50 MB, server CPUs up to some hundred."""
MOST_COPIES = {"cpu": 16}
MOST_COPIES_ELSEWHERE = 32
"""Layers of one program: as many as an 8B model has, and on CPU fewer, which compiles sooner."""
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


@dataclass(frozen=True)
class Options:
    """What to time. None, or an empty tuple: the platform's own.

    Attributes:
        rows: of decode steps; of matrix products.
        context: keys of a row.
        chunk: tokens of prefill.
        page_dtype: of the cache's pages; None: that of the model.
    """

    model: str | None = None
    rows: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    chunk: tuple[int, ...] = ()
    page_size: int | None = None
    page_dtype: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A compiled step over some copies, and what it begins with; the result's first leaf is an output."""

    step: Callable[[Any], Any]
    carry: Any


@dataclass(frozen=True)
class Workload:
    """One thing to time.

    Attributes:
        phase: what kind it is, such as "decode"; blocks are tuned for each.
        problem: what a backend's `require` looks at.
        flops, nbytes: the work of one call and the fewest bytes that it moves.
        footprint: bytes of what one copy keeps on the device.
        prepare: from a backend, its function, or another in its form, and a number of copies.
    """

    op: str
    name: str
    phase: str
    problem: Any
    flops: float
    nbytes: float
    footprint: int
    prepare: Callable[[Any, Callable[..., Any], int], Prepared]

    def copies(self, budget: int, most: int | None = None) -> int:
        """How many layers to run in turn: more than caches hold, where they fit.

        Raises:
            NotImplementedError: there is no room for one.
        """
        if self.footprint > budget:
            raise NotImplementedError(f"needs {self.footprint / 1e9:.1f} GB, there are {budget / 1e9:.1f}")
        enough = -(-CACHES // self.footprint)
        most = most or MOST_COPIES.get(jax.default_backend(), MOST_COPIES_ELSEWHERE)
        return max(1, min(enough, most, budget // self.footprint))


@dataclass(frozen=True)
class Measurement:
    """What became of a workload on a backend.

    Attributes:
        seconds: of one call; None where it was not timed.
        copies: how many layers, with pools or weights of their own, ran in turn.
        bound: "copy" or "matmul", whichever takes longer at the measured rates.
        fraction: of that limit.
        reason: why it was not timed.
        failed: whether that is an error, and no refusal.
    """

    op: str
    backend: str
    workload: str
    seconds: float | None = None
    copies: int = 0
    bytes_per_second: float = 0.0
    flops_per_second: float = 0.0
    bound: str = ""
    fraction: float = 0.0
    reason: str = ""
    failed: bool = False

    def __str__(self) -> str:
        """A line of a table."""
        head = f"{self.op:16} {self.backend:10} {self.workload:34}"
        if self.seconds is None:
            return f"{head} {'failed' if self.failed else 'not timed'}: {self.reason}"
        rate = (
            f"{self.bytes_per_second / 1e9:9.1f} GB/s    "
            if self.bound == "copy"
            else f"{self.flops_per_second / 1e12:9.3f} TFLOP/s "
        )
        return f"{head} {self.seconds * 1e3:10.4f} ms {rate} {self.fraction:6.1%} of {self.bound}"


def measure(
    workload: Workload, backend: Any, limits: Limits, effort: Effort, most: int | None = None
) -> Measurement:
    """Times a workload on a backend, with at most so many copies, unless the backend refuses."""
    names = (workload.op, backend.name, workload.name)
    try:
        backend.require(workload.problem)
        copies = workload.copies(memory_budget(), most)
        prepared = workload.prepare(backend, function_of(backend), copies)
        seconds, _ = time_step(prepared.step, prepared.carry, effort)
    except (NotImplementedError, ValueError) as error:
        return Measurement(*names, reason=str(error))
    except Exception as error:  # one kernel that does not compile is to spoil no other's figures
        return Measurement(*names, reason=f"{type(error).__name__}: {error}", failed=True)
    return make_measurement(workload, backend.name, seconds / copies, copies, limits)


def make_measurement(
    workload: Workload, backend: str, seconds: float, copies: int, limits: Limits
) -> Measurement:
    """From the seconds of one call."""
    least, bound = limits.seconds(workload.flops, workload.nbytes)
    return Measurement(
        workload.op,
        backend,
        workload.name,
        seconds,
        copies,
        workload.nbytes / seconds,
        workload.flops / seconds,
        bound,
        least / seconds,
    )


def describe_machine() -> dict[str, str]:
    """Device, versions and date, for whoever reads the figures later."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "platform": device.platform,
        "device": device.device_kind,
        "python": platform.python_version(),
    } | dict(_versions())


def as_json(limits: Limits, measurements: list[Measurement]) -> dict[str, Any]:
    """All that was measured."""
    return {
        "machine": describe_machine(),
        "limits": asdict(limits),
        "measurements": [asdict(one) for one in measurements],
    }


def as_markdown(limits: Limits, measurements: list[Measurement]) -> str:
    """The same as a table."""
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
    lines = [
        f"{machine}. Measured in the same run: copies {limits.copy / 1e9:.1f} GB/s, read and written, "
        f"products of bfloat16 {limits.matmul / 1e12:.2f} TFLOP/s.",
        "",
        "| Op | Backend | Workload | ms | GB/s | TFLOP/s | Of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in measurements:
        cells = f"| {one.op} | {one.backend} | {one.workload} |"
        if one.seconds is None:
            lines.append(f"{cells} | | | {'failed' if one.failed else 'not timed'}: {one.reason} |")
        else:
            lines.append(
                f"{cells} {one.seconds * 1e3:.4f} | {one.bytes_per_second / 1e9:.1f} | "
                f"{one.flops_per_second / 1e12:.3f} | {one.fraction:.1%} of {one.bound} |"
            )
    return "\n".join(lines) + "\n"


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
