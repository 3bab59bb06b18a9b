"""How the GPU kernel cuts a product, and what it needs of a thread block's shared memory."""

from dataclasses import dataclass

from pallas_kernels.hopper import MULTIPROCESSORS, RESERVED, ROWS, SHARED_MEMORY
from pallas_kernels.quant_matmul.problem import FEW_TOKENS, Problem
from pallas_kernels.tuning import Blocks, lookup

OP = "quant_matmul"
STEP = 128
"""Inputs that are in work at a time."""
TUNABLE = {"warpgroups": (2, 4), "stages": (2, 3, 4, 6)}
"""What `tuning.json` may choose: fields of `Plan`."""


@dataclass(frozen=True)
class Weights:
    """What of a weight the kernel is compiled for.

    Attributes:
        packed: whether a byte holds two values.
        scale_rows: inputs that share a scale; 0: all do.
        zero: whether there are zero points.
        per_token: whether there are numbers for each token and chunk: of zero points, or of rounded tokens.
    """

    packed: bool
    scale_rows: int
    zero: bool
    per_token: bool

    @property
    def grouped(self) -> bool:
        """Whether a product is scaled before the next is added; else once, when all of it is summed."""
        return self.scale_rows > 0 or self.zero

    @property
    def chunk(self) -> int:
        """Inputs whose product is taken by itself."""
        return min(self.scale_rows or STEP, STEP)

    @property
    def run(self) -> int:
        """Inputs of one wgmma, of a chunk that is packed the even or the odd ones."""
        return min(ROWS, self.chunk // (2 if self.packed else 1))


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        tokens: of a tile.
        warpgroups: that compute, each on 64 outputs of a tile.
        stages: steps in shared memory.
        splits: thread blocks that share a tile's inputs.
    """

    tokens: int
    warpgroups: int
    stages: int
    splits: int

    @property
    def outputs(self) -> int:
        """Of a tile."""
        return ROWS * self.warpgroups

    @property
    def stored(self) -> int:
        """Tokens whose results are stored at a time: those of all would take a stage's memory."""
        return min(self.tokens, 64)

    def registers(self) -> tuple[int, int] | None:
        """For each thread of the warpgroup that copies, and of those that compute; None: as they are.

        Three warpgroups start with 168 each, and may move them between themselves.
        """
        return (40, 232) if self.tokens > FEW_TOKENS else None

    def shared_memory(self, weights: Weights, out_itemsize: int) -> int:
        """Bytes of shared memory, without some hundred for barriers; results take `out_itemsize` each."""
        stage = STEP * self.outputs // (2 if weights.packed else 1) + 2 * STEP * self.tokens
        if weights.grouped:
            chunks = STEP // weights.chunk
            stage += 4 * chunks * ((1 + weights.zero) * self.outputs + self.tokens)
        wide = 2 * STEP * self.outputs
        result = self.stored * self.outputs * (4 if self.splits > 1 else out_itemsize)
        return self.stages * stage + wide + result


def weights_of(problem: Problem) -> Weights:
    """What the kernel has to know of the problem's weight and rounded tokens."""
    return Weights(
        packed=problem.kind == "int4",
        scale_rows=problem.scale_rows if problem.scale_rows < problem.inputs else 0,
        zero=problem.zero,
        per_token=problem.zero or problem.activation != "none",
    )


def make_plan(problem: Problem, weights: Weights, out_itemsize: int) -> Plan:
    """The blocks measured on the problem's card, or computed ones, with as many of the stages as fit.

    Args:
        out_itemsize: bytes of a result.

    Raises:
        ValueError: see `lookup`.
    """
    default = {"warpgroups": max_warpgroups(problem), "stages": 4}
    key = {"phase": problem.phase, **problem.tuning_key}
    tuned = lookup(OP, "gpu", problem.device_kind, key, TUNABLE)
    return fit(problem, weights, out_itemsize, tuned or default)


def max_warpgroups(problem: Problem) -> int:
    """That compute: four share the registers where tokens are few, so that more threads widen the weight."""
    return 4 if problem.tokens <= FEW_TOKENS // 2 and problem.outputs % (4 * ROWS) == 0 else 2


def fit(problem: Problem, weights: Weights, out_itemsize: int, blocks: Blocks) -> Plan:
    """The plan with these blocks, as far as they can be had."""
    warpgroups = min(blocks["warpgroups"], max_warpgroups(problem))
    columns = problem.outputs // (warpgroups * ROWS)
    least = 32 if weights.per_token and weights.grouped else 8  # copies want 128 bytes
    tokens = min(2 * FEW_TOKENS, max(least, 1 << (problem.tokens - 1).bit_length()))
    wide = columns * -(-problem.tokens // (4 * FEW_TOKENS))
    if not weights.grouped and out_itemsize == 2 and wide >= MULTIPROCESSORS:
        tokens = 4 * FEW_TOKENS  # of groups both the product and the sum would have to fit in registers
    tiles = columns * -(-problem.tokens // tokens)
    splits = max(1, min(MULTIPROCESSORS // tiles, problem.inputs // STEP))
    for stages in range(blocks["stages"], 0, -1):
        plan = Plan(tokens, warpgroups, stages, splits)
        if plan.shared_memory(weights, out_itemsize) <= SHARED_MEMORY - RESERVED:
            return plan
    raise NotImplementedError(f"{problem}: a step does not fit in {SHARED_MEMORY} bytes")
