"""How each backend is proven: what became of its cases here, and what it was compiled for."""

import fnmatch
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pallas_kernels.ops import Op, runs_on
from pallas_kernels.report import Report
from pallas_kernels.targets.proofs import Proof, read_proofs


@dataclass(frozen=True)
class Verdict:
    """One backend.

    Attributes:
        report: None where the cases were not run.
        reason: why not.
        seconds: that the cases took, compiling included.
        compiled: a line for each compiler: what it compiled the backend for.
    """

    op: str
    backend: str
    report: Report | None = None
    reason: str = ""
    seconds: float = 0.0
    compiled: tuple[str, ...] = field(default=())

    def counts(self) -> Mapping[str, int]:
        """Cases passed, refused and failed."""
        return Counter(outcome.status for outcome in self.report.outcomes) if self.report else Counter()

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        outcomes = self.report.outcomes if self.report else ()
        return {
            "op": self.op,
            "backend": self.backend,
            "how": self.report.how if self.report else None,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "compiled": list(self.compiled),
            **{status: self.counts()[status] for status in ("passed", "refused", "failed")},
            "cases": [vars(outcome) for outcome in outcomes],
        }

    def __str__(self) -> str:
        """A line of a table, and lines for what failed and for each reason of a refusal."""
        head = f"{self.op:16} {self.backend:10}"
        if self.report is None:
            lines = [f"{head} {'-':>6} {'-':>7} {'-':>6}  {self.reason}"]
        else:
            counts = self.counts()
            numbers = f"{counts['passed']:6} {counts['refused']:7} {counts['failed']:6}"
            lines = [f"{head} {numbers}  {self.report.how}, {self.seconds:.0f} s"]
            lines += [f"    failed {one.case!r}: {one.detail}" for one in self.report.having("failed")]
            reasons: dict[str, list[str]] = {}
            for one in self.report.having("refused"):
                reasons.setdefault(one.detail, []).append(one.case)
            lines += [f"    refused {', '.join(cases)}: {detail}" for detail, cases in reasons.items()]
        return "\n".join([*lines, *(f"    {line}" for line in self.compiled)])


def select_cases(op: Op, pattern: str) -> dict[str, Any]:
    """The cases whose names match, as in a shell; a word without wildcards is found anywhere in a name.

    Raises:
        ValueError: none does.
    """
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = {name: case for name, case in op.cases.items() if fnmatch.fnmatchcase(name, wanted)}
    if not found:
        raise ValueError(f"{op.name}: no case matches {pattern!r}; there are {', '.join(op.cases)}")
    return found


def verify(op: Op, name: str, platform: str, cases: Mapping[str, Any], *, interpret: bool) -> Verdict:
    """Runs the cases on a backend that is for this platform, or interprets its kernel.

    Args:
        interpret: where the backend is for another platform.
    """
    backend = op.registry.get(name)
    compiled = compiled_for(op.name, name)
    here = runs_on(op, name, platform)
    if not here and backend.interpreted is None:
        return Verdict(
            op.name, name, reason=f"not for {platform}, and has no interpreted form", compiled=compiled
        )
    if not here and not interpret:
        return Verdict(
            op.name, name, reason=f"not for {platform}; --interpret interprets it", compiled=compiled
        )
    if not here and platform != "cpu":
        reason = f"not for {platform}; it is interpreted on the CPU, with JAX_PLATFORMS=cpu"
        return Verdict(op.name, name, reason=reason, compiled=compiled)
    start = time.perf_counter()
    report = op.check(name, cases=cases, interpret=not here)
    return Verdict(op.name, name, report, seconds=time.perf_counter() - start, compiled=compiled)


def compiled_for(op: str, backend: str) -> tuple[str, ...]:
    """What `make aot` compiled of it, by compiler and day."""
    groups: dict[tuple[str, str], list[Proof]] = {}
    for proof in read_proofs():
        if (proof.op, proof.backend) == (op, backend):
            groups.setdefault((proof.compiler, proof.date), []).append(proof)
    return tuple(
        f"compiled for {', '.join(sorted({proof.target for proof in proofs}))}: {len(proofs)} programs, "
        f"{compiler}, {date}"
        for (compiler, date), proofs in sorted(groups.items())
    )
