"""How the GPU kernel cuts a grouped product, and what it needs of a thread block's shared memory."""

from dataclasses import dataclass

from pallas_kernels.grouped_matmul.problem import Problem
from pallas_kernels.hopper import MULTIPROCESSORS, RESERVED, ROWS, SHARED_MEMORY
from pallas_kernels.tuning import Blocks, lookup

OP = "grouped_matmul"
PHASE = "product"
STEP = 64
"""Inputs that are in work at a time: in bfloat16 as many as the widest swizzle has."""
TUNABLE = {"rows": (8, 16, 32, 64, 128, 256), "warpgroups": (2, 4), "stages": (2, 4, 8)}
"""What `tuning.json` may choose: fields of `Plan`."""
MANY_ROWS = 64
"""More of them take the registers that four computing warpgroups would need."""
MOST_PANEL = 16


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        rows: of a tile, all of one group.
        warpgroups: that compute, each on 64 outputs of a tile.
        stages: steps in shared memory.
        blocks: thread blocks, which share out the tiles.
    """

    rows: int
    warpgroups: int
    stages: int
    blocks: int = MULTIPROCESSORS

    @property
    def outputs(self) -> int:
        """Of a tile."""
        return ROWS * self.warpgroups

    @property
    def stored(self) -> int:
        """Rows whose results are stored at a time: those of all would take a stage's memory."""
        return min(self.rows, 64)

    def columns(self, outputs: int) -> int:
        """Tiles beside each other; the last one may reach beyond the outputs."""
        return -(-outputs // self.outputs)

    def panel(self, columns: int) -> int:
        """How many of the columns are taken before the next rows.

        Their weights are then in the L2 for the next rows of the group, and the rows for the next columns.
        """
        return next(size for size in range(min(columns, MOST_PANEL), 0, -1) if columns % size == 0)

    def registers(self) -> tuple[int, int] | None:
        """For each thread of the warpgroup that copies, and of those that compute; None: as they are.

        Three warpgroups start with 168 each, and may move them between themselves.
        """
        return (40, 232) if self.rows > MANY_ROWS else None

    def shared_memory(self, out_itemsize: int) -> int:
        """Bytes of shared memory, without some hundred for barriers; results take `out_itemsize` each."""
        stage = 2 * STEP * (self.rows + self.outputs)
        return self.stages * stage + self.stored * self.outputs * out_itemsize


def make_plan(problem: Problem) -> Plan:
    """The blocks measured on the problem's card, or computed ones, with as many of the stages as fit.

    Raises:
        ValueError: see `lookup`.
    """
    key = {"phase": PHASE, **problem.tuning_key}
    tuned = lookup(OP, "gpu", problem.device_kind, key, TUNABLE)
    return fit(problem, tuned or {"rows": default_rows(problem), "warpgroups": 2, "stages": 8})


def default_rows(problem: Problem) -> int:
    """Twice what a group has on average: most groups then take one tile, and their weights are read once.

    Below 300 rows or so the time goes into reading weights, beyond into products, which rows that are not
    there cost as much as others.
    """
    average = int(problem.tuning_key["rows"])
    return 256 if average >= 512 else min(128, max(8, 2 * average))


def fit(problem: Problem, blocks: Blocks) -> Plan:
    """The plan with these blocks, as far as they can be had."""
    warpgroups = 2 if blocks["rows"] > MANY_ROWS else blocks["warpgroups"]
    for stages in range(blocks["stages"], 1, -1):
        plan = Plan(blocks["rows"], warpgroups, stages)
        if plan.shared_memory(problem.out_dtype.itemsize) <= SHARED_MEMORY - RESERVED:
            return plan
    raise NotImplementedError(f"{problem}: two steps do not fit in {SHARED_MEMORY} bytes")
