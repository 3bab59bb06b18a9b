"""What of products with quantized weights is timed: a model's largest matrix in each kind of weight."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.bench import Options, Prepared, Workload
from pallas_kernels.models import get_model
from pallas_kernels.quant_matmul.problem import Problem
from pallas_kernels.quant_matmul.weight import Kind, quantize

DEFAULTS = {
    "cpu": Options("smollm2-135m", rows=(1, 32, 512)),
    "gpu": Options("llama-3-8b", rows=(1, 32, 256, 2048)),
    "tpu": Options("llama-3-8b", rows=(1, 32, 256, 2048)),
}
GROUP = 128
"""Rows of int4 weights that share a scale."""


@dataclass(frozen=True)
class Product:
    """One call."""

    problem: Problem

    @property
    def footprint(self) -> int:
        """Bytes of the weight and its scales."""
        one = self.problem
        values = one.inputs * one.outputs // (2 if one.kind == "int4" else 1)
        return values + 4 * -(-one.inputs // one.scale_rows) * one.outputs

    @property
    def nbytes(self) -> float:
        """The weight, rows and results, each once."""
        one = self.problem
        return self.footprint + one.tokens * (one.inputs + one.outputs) * one.dtype.itemsize

    @property
    def flops(self) -> float:
        """As of a product with a weight that is not quantized."""
        return 2.0 * self.problem.tokens * self.problem.inputs * self.problem.outputs

    def prepare(self, backend: Any, function: Callable[..., Any], copies: int) -> Prepared:
        """A program of `copies` products with weights of their own, each of which waits for the last."""
        one, keys = self.problem, iter(jax.random.split(jax.random.key(0), 1 + copies))
        block = (one.scale_rows, 1)
        shape = (one.inputs, one.outputs)
        make = jax.jit(lambda key: quantize(jax.random.normal(key, shape), one.kind, block))
        weights = [make(next(keys)) for _ in range(copies)]
        multiply = partial(function, activation=one.activation, out_dtype=one.dtype)

        @jax.jit
        def run(weights: list[Any], carry: tuple[Array, Array]) -> tuple[Array, Array]:
            out, x = carry
            for weight in weights:
                out = multiply(x, weight)
                x = x + (1e-30 * out[0, 0]).astype(x.dtype)
            return out, x

        x = jax.random.normal(next(keys), (one.tokens, one.inputs), one.dtype)
        return Prepared(partial(run, weights), (jnp.zeros((one.tokens, one.outputs), one.dtype), x))


def workloads(platform: str, device_kind: str, options: Options) -> list[Workload]:
    """For each kind of weight and number of tokens the product of a model's first MLP matrix."""
    default = DEFAULTS[platform]
    name = options.model or default.model or ""
    model = get_model(name)
    found = []
    kinds: tuple[Kind, ...] = ("int8", "int4", "fp8")
    for kind in kinds:
        for rows in options.rows or default.rows:
            scale_rows = GROUP if kind == "int4" and model.hidden % GROUP == 0 else model.hidden
            problem = Problem(
                platform, device_kind, rows, model.hidden, model.intermediate, jnp.dtype(jnp.bfloat16), kind,
                scale_rows,
            )  # fmt: skip
            one = Product(problem)
            found.append(
                Workload(
                    "quant_matmul", f"{name}, {kind}, {rows} tokens", problem.phase, problem, one.flops,
                    one.nbytes, one.footprint, one.prepare,
                )
            )  # fmt: skip
    return found
