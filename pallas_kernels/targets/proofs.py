"""What was compiled for which chip, and what the compiled programs were found to be."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent.parent / "proofs.json"


@dataclass(frozen=True)
class Proof:
    """A program that was compiled for a chip, and held to what `checked` says.

    Attributes:
        op: of this library, or "step" for a whole step of the engine.
        target: as `Target.parse` reads it.
        devices: chips of it that the program was cut for.
        shape: model, kind of step and sizes, in words.
        pages: dtype of the cache's pages; empty for an op that has none.
        checked: what holds, in words.
        kernel_memory: bytes of VMEM, or of a block's shared memory, that the kernel uses; None where the
            program has no kernel of ours.
        registers: of a GPU kernel's threads.
        temporaries: bytes of the device's memory beside arguments and results.
        collectives: of each kind how many, and bytes of their results.
        seconds: that compiling took; not part of what is proven.
        compiler: names and versions.
        date: when that was, YYYY-MM-DD.
    """

    op: str
    backend: str
    target: str
    devices: int
    shape: str
    pages: str
    checked: tuple[str, ...]
    kernel_memory: int | None
    registers: int | None
    temporaries: int
    collectives: dict[str, tuple[int, int]]
    seconds: float
    compiler: str
    date: str

    @property
    def key(self) -> tuple[str, ...]:
        """What is the same in another run."""
        return (self.op, self.backend, self.target, str(self.devices), self.shape, self.pages)


def read_proofs(path: Path = PATH) -> list[Proof]:
    """The proofs that come with the library."""
    if not path.exists():
        return []
    return [_from_json(record) for record in json.loads(path.read_text())]


def write_proofs(proofs: list[Proof], path: Path = PATH) -> None:
    """Keeps proofs, one a line, so that a change shows as one."""
    lines = (json.dumps(asdict(proof)) for proof in sorted(proofs, key=lambda proof: proof.key))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def summary(proofs: list[Proof]) -> str:
    """A Markdown table: a line for each op, backend, target and number of chips."""
    groups: dict[tuple[str, str, str, int], list[Proof]] = {}
    for proof in proofs:
        groups.setdefault((proof.op, proof.backend, proof.target, proof.devices), []).append(proof)
    lines = [
        "| Op | Backend | Compiled for | Chips | Programs | Pages | Kernel memory | Temporaries | Compile |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (op, backend, target, devices), group in sorted(groups.items()):
        pages = ", ".join(sorted({proof.pages for proof in group if proof.pages}))
        kernel = max((proof.kernel_memory or 0 for proof in group), default=0)
        temporaries = max(proof.temporaries for proof in group)
        seconds = max(proof.seconds for proof in group)
        cells = (op, backend, target, devices, len(group), pages, _size(kernel), _size(temporaries))
        lines.append(f"| {' | '.join(map(str, cells))} | {seconds:.0f} s |")
    return "\n".join(lines)


def _size(nbytes: int) -> str:
    """In MB, or KB below one."""
    if nbytes == 0:
        return "-"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.0f} KB"


def _from_json(record: dict[str, Any]) -> Proof:
    collectives = {kind: (count, size) for kind, (count, size) in record["collectives"].items()}
    return Proof(**{**record, "checked": tuple(record["checked"]), "collectives": collectives})
