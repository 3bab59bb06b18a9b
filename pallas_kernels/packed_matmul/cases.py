"""The cases that every backend is held to: fixed corners and anything hypothesis draws."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pallas_kernels.packed_matmul.panels import Gate

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Case:
    """Rows `[rows, inputs]` times a weight `[inputs, outputs]`, or a gated one `[inputs, 2, outputs]`."""

    rows: int
    inputs: int = 64
    outputs: int = 64
    dtype: str = "float32"
    out_dtype: str = "float32"
    gate: Gate | None = None
    norm: bool = False
    residual: bool = False
    seed: int = 0

    @property
    def tolerance(self) -> float:
        """Relative to the largest magnitude of the expected output."""
        if self.out_dtype == "bfloat16":
            return 1e-2
        # a normalized row may be rounded the other way where it lies between two numbers
        return 1e-3 if self.norm and self.dtype == "bfloat16" else 1e-5


def _all_dtypes(**cases: Case) -> dict[str, Case]:
    """Each case in float32, in bfloat16, and from bfloat16 to float32."""
    found = {}
    for name, case in cases.items():
        for dtype, out_dtype in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
            title = f"{name.replace('_', ' ')}, {dtype}" + (" to float32" if dtype != out_dtype else "")
            if dtype == "float32":
                title = name.replace("_", " ")
            found[title] = Case(**{**vars(case), "dtype": dtype, "out_dtype": out_dtype})
    return found


CORNERS = _all_dtypes(
    one_row=Case(1),
    two_rows=Case(2),
    rows_of_every_kernel=Case(11, 128, 96),
    rows_beyond_a_tile=Case(17, 128, 96),
    rows_beyond_two_tiles=Case(33, 128, 96),
    many_rows=Case(130, 64, 32),
    many_rows_and_few_panels=Case(300, 32, 32),
    odd_inputs=Case(5, 37, 64),
    one_input=Case(3, 1, 64),
    outputs_of_no_panel=Case(5, 64, 75),
    one_output=Case(3, 64, 1),
    long_sums=Case(4, 3000, 64),
    many_panels=Case(3, 64, 4000),
    gated_by_silu=Case(35, 64, 96, gate="silu"),
    gated_by_gelu=Case(3, 100, 75, gate="gelu_tanh"),
    normalized=Case(5, 64, 96, norm=True),
    many_normalized_rows=Case(150, 75, 32, norm=True),
    with_a_residual=Case(40, 64, 75, residual=True),
    normalized_and_gated_with_a_residual=Case(3, 100, 40, gate="silu", norm=True, residual=True),
)


@dataclass(frozen=True)
class Arrays:
    """A case's inputs in its dtypes, and what must come out, in float64."""

    x: Float[np.ndarray, "rows in"]
    weight: Float[np.ndarray, "..."]
    norm_weight: Float[np.ndarray, " in"] | None
    residual: Float[np.ndarray, "rows out"] | None
    out: Float[np.ndarray, "rows out"]


EPSILON, OFFSET = 0.1, 1.0
"""Of norms; such a large epsilon shows when it is left out."""


def build(case: Case) -> Arrays:
    """Draws the case's numbers and computes its result from what their dtypes hold of them."""
    rng = np.random.default_rng(case.seed)
    dtype = jnp.dtype(case.dtype)
    x = rng.normal(size=(case.rows, case.inputs)).astype(dtype)
    shape = (case.inputs, case.outputs) if case.gate is None else (case.inputs, 2, case.outputs)
    weight = rng.normal(size=shape).astype(dtype)
    rows, norm_weight, residual = x.astype(np.float64), None, None
    if case.norm:
        norm_weight = rng.normal(size=case.inputs).astype(dtype)
        rows /= np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + EPSILON)
        rows = (rows * (OFFSET + norm_weight.astype(np.float64))).astype(dtype).astype(np.float64)
    products = np.tensordot(rows, weight.astype(np.float64), axes=1)
    out = products if case.gate is None else _GATES[case.gate](products[:, 0]) * products[:, 1]
    if case.residual:
        residual = rng.normal(size=out.shape).astype(jnp.dtype(case.out_dtype))
        out = out + residual.astype(np.float64)
    return Arrays(x, weight, norm_weight, residual, out)


_GATES = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def cases() -> "SearchStrategy[Case]":
    """Anything that the op can be asked for, small."""
    from hypothesis import strategies as st

    dtypes = st.sampled_from([("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
    sizes = st.integers(1, 100)
    return st.builds(
        lambda rows, inputs, outputs, dtypes, *rest: Case(rows, inputs, outputs, *dtypes, *rest),
        sizes, sizes, sizes, dtypes, st.sampled_from([None, "silu", "gelu_tanh"]), st.booleans(),
        st.booleans(), st.integers(0, 99),
    )  # fmt: skip
