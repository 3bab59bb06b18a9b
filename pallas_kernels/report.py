"""What became of an op's cases."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "refused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """One case: refused is what the backend says, by name, that it does not serve."""

    case: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """All cases of one backend.

    Attributes:
        how: what was done, such as "run on cpu" or "interpreted".
    """

    op: str
    backend: str
    how: str
    outcomes: tuple[Outcome, ...]

    def having(self, status: Status) -> Iterator[Outcome]:
        """The outcomes of that kind."""
        return (outcome for outcome in self.outcomes if outcome.status == status)

    @property
    def passed(self) -> bool:
        """Whether no case failed and at least one passed."""
        return not any(self.having("failed")) and any(self.having("passed"))

    def raise_if_failed(self) -> None:
        """Raises:
        AssertionError: a case failed, or none passed.
        """
        if not self.passed:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        """A line of counts, and one for each case that failed or was refused."""
        counts = Counter(outcome.status for outcome in self.outcomes)
        total = ", ".join(f"{counts[status]} {status}" for status in ("passed", "refused", "failed"))
        lines = [f"{self.op}, {self.backend}, {self.how}: {total}"]
        for status in ("failed", "refused"):
            lines += [f"  {status} {o.case!r}: {o.detail}" for o in self.having(status)]
        return "\n".join(lines)
