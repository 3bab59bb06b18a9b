"""How much attention there is to compute and to read, whatever computes it."""

from pallas_kernels.paged_attention.problem import Problem


def attention_flops(problem: Problem, rows: int, tokens: int, context: int) -> float:
    """Of both products, for the keys that are seen and no others; an addition and a multiplication are two.

    Args:
        problem: a layer on one device.
        rows: all alike.
        tokens: new ones of each row.
        context: keys of each row, the new tokens' included.
    """
    seen = _seen(tokens, context, problem.sliding_window)
    return 4.0 * rows * seen * problem.heads * problem.geometry.head_dim


def attention_bytes(problem: Problem, rows: int, tokens: int, context: int) -> float:
    """Keys and values that are seen, read once; those that are new, written; queries and outputs.

    The arguments are those of `attention_flops`.
    """
    geometry, window = problem.geometry, problem.sliding_window
    keys = context if window is None else min(context, window + tokens - 1)
    token = geometry.bytes_per_page / geometry.page_size
    queries = 2 * tokens * problem.heads * geometry.head_dim * problem.dtype.itemsize
    return rows * ((keys + tokens) * token + queries)


def _seen(tokens: int, context: int, window: int | None) -> int:
    """Keys that the tokens of a row see, summed over them: the last sees all, each before it one fewer."""
    first, last = context - tokens + 1, context
    if window is None or window >= last:
        return (first + last) * tokens // 2
    growing = max(0, window - first)  # tokens that see fewer than the window
    return (first + first + growing - 1) * growing // 2 + (tokens - growing) * window
