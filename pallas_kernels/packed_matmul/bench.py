"""What of products with packed weights is timed: a model's largest matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.bench import Options, Prepared, Workload
from pallas_kernels.models import get_model
from pallas_kernels.packed_matmul.panels import pack
from pallas_kernels.packed_matmul.problem import Problem

DEFAULTS = {
    "cpu": Options("smollm2-135m", rows=(2, 32, 512)),
    "gpu": Options("llama-3-8b", rows=(32,)),
    "tpu": Options("llama-3-8b", rows=(32,)),
}


@dataclass(frozen=True)
class Product:
    """One call."""

    problem: Problem

    @property
    def footprint(self) -> int:
        """Bytes of the weight."""
        return self.problem.inputs * self.problem.outputs * self.problem.dtype.itemsize

    @property
    def nbytes(self) -> float:
        """The weight, rows and results, each once."""
        one = self.problem
        return self.footprint + one.rows * (
            one.inputs * one.dtype.itemsize + one.outputs * one.out_dtype.itemsize
        )

    @property
    def flops(self) -> float:
        """Of all rows."""
        return 2.0 * self.problem.rows * self.problem.inputs * self.problem.outputs

    def prepare(self, backend: Any, function: Callable[..., Any], copies: int) -> Prepared:
        """A program of `copies` products with weights of their own, each of which waits for the last."""
        one, keys = self.problem, iter(jax.random.split(jax.random.key(0), 1 + copies))
        make = jax.jit(lambda key: pack(jax.random.normal(key, (one.inputs, one.outputs), one.dtype)))
        weights = [make(next(keys)) for _ in range(copies)]
        options = {"gate": None, "norm": None, "residual": None}
        multiply = partial(function, outputs=one.outputs, out_dtype=one.out_dtype, **options)

        @jax.jit
        def run(weights: list[Any], carry: tuple[Array, Array]) -> tuple[Array, Array]:
            out, x = carry
            for weight in weights:
                out = multiply(x, weight)
                x = x + (1e-30 * out[0, 0]).astype(x.dtype)
            return out, x

        x = jax.random.normal(next(keys), (one.rows, one.inputs), one.dtype)
        return Prepared(partial(run, weights), (jnp.zeros((one.rows, one.outputs), one.out_dtype), x))


def workloads(platform: str, device_kind: str, options: Options) -> list[Workload]:
    """In float32 and bfloat16, for each number of rows, the product of a model's first MLP matrix."""
    default = DEFAULTS[platform]
    name = options.model or default.model or ""
    model = get_model(name)
    found = []
    for dtype in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        for rows in options.rows or default.rows:
            problem = Problem(platform, device_kind, rows, model.hidden, 2 * model.intermediate, dtype, dtype)
            one = Product(problem)
            found.append(
                Workload(
                    "packed_matmul", f"{name}, {dtype}, {rows} rows", "product", problem, one.flops,
                    one.nbytes, one.footprint, one.prepare,
                )
            )  # fmt: skip
    return found
