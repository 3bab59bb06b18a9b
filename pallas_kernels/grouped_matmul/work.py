"""How much a grouped product has to compute and to read, whatever computes it."""

from pallas_kernels.grouped_matmul.problem import Problem


def grouped_flops(problem: Problem) -> float:
    """Of the rows there are; an addition and a multiplication are two."""
    return 2.0 * problem.tokens * problem.inputs * problem.outputs


def grouped_bytes(problem: Problem, used: float) -> float:
    """Weights of the `used` groups that have rows, rows and results, each once."""
    rows = problem.inputs * problem.dtype.itemsize + problem.outputs * problem.out_dtype.itemsize
    return used * problem.inputs * problem.outputs * problem.weight_dtype.itemsize + problem.tokens * rows


def expected_groups(groups: int, per_token: int, tokens: int) -> float:
    """How many groups have rows on average, where each token goes to `per_token` of them at random."""
    return groups * (1.0 - (1.0 - per_token / groups) ** tokens)
