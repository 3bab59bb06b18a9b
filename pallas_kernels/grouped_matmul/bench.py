"""What of the grouped product is timed: the first product of a mixture's experts, tokens spread at random."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.bench import Options, Prepared, Workload
from pallas_kernels.grouped_matmul.problem import Problem
from pallas_kernels.grouped_matmul.work import grouped_bytes, grouped_flops
from pallas_kernels.models import get_model

DEFAULTS = {
    "cpu": Options("small-moe", rows=(1, 32, 512)),
    "gpu": Options("mixtral-8x7b", rows=(1, 32, 256, 2048)),
    "tpu": Options("mixtral-8x7b", rows=(1, 32, 256, 2048)),
}


@dataclass(frozen=True)
class Product:
    """One call; `sizes` are the rows of each group."""

    problem: Problem
    sizes: tuple[int, ...]

    @property
    def footprint(self) -> int:
        """Bytes of all weights."""
        one = self.problem
        return one.groups * one.inputs * one.outputs * one.weight_dtype.itemsize

    @property
    def nbytes(self) -> float:
        """Weights of the groups that have rows, rows and results, each once."""
        return grouped_bytes(self.problem, sum(size > 0 for size in self.sizes))

    @property
    def flops(self) -> float:
        """Of the rows there are."""
        return grouped_flops(self.problem)

    def prepare(self, backend: Any, function: Callable[..., Any], copies: int) -> Prepared:
        """A program of `copies` products with weights of their own, each of which waits for the last."""
        one, keys = self.problem, iter(jax.random.split(jax.random.key(0), 1 + copies))
        shape = (one.groups, one.inputs, one.outputs)
        weights = [jax.random.normal(next(keys), shape, one.weight_dtype) for _ in range(copies)]
        if one.platform == "cpu":  # bfloat16 as bits spares a copy of all weights there
            weights = [jax.lax.bitcast_convert_type(weight, jnp.uint16) for weight in weights]
        sizes = jnp.asarray(self.sizes, jnp.int32)
        multiply = partial(function, out_dtype=one.out_dtype)

        @jax.jit
        def run(weights: list[Array], carry: tuple[Array, Array]) -> tuple[Array, Array]:
            out, x = carry
            for weight in weights:
                out = multiply(x, weight, sizes)
                x = x + (1e-30 * out[0, 0]).astype(x.dtype)
            return out, x

        x = jax.random.normal(next(keys), (one.tokens, one.inputs), one.dtype)
        return Prepared(partial(run, weights), (jnp.zeros((one.tokens, one.outputs), one.out_dtype), x))


def workloads(platform: str, device_kind: str, options: Options) -> list[Workload]:
    """For each number of tokens the product that leads into the experts.

    Raises:
        ValueError: the model has no experts.
    """
    default = DEFAULTS[platform]
    name = options.model or default.model or ""
    model = get_model(name)
    if model.experts is None:
        raise ValueError(f"grouped_matmul: {name} has no experts; take mixtral-8x7b or qwen3-30b-a3b")
    experts, found = model.experts, []
    for rows in options.rows or default.rows:
        tokens = rows * experts.per_token
        rng = np.random.default_rng(rows)
        chosen = [rng.permutation(experts.count)[: experts.per_token] for _ in range(rows)]
        sizes = np.bincount(np.concatenate(chosen), minlength=experts.count)
        problem = Problem(
            platform, device_kind, tokens, experts.count, model.hidden, experts.intermediate,
            jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16),
        )  # fmt: skip
        one = Product(problem, tuple(map(int, sizes)))
        found.append(
            Workload(
                "grouped_matmul", f"{name}, {rows} tokens", "product", problem, one.flops, one.nbytes,
                one.footprint, one.prepare,
            )
        )  # fmt: skip
    return found
