"""The cases that every backend is held to: fixed corners and anything hypothesis draws.

Rows without a group and the weights of empty groups are full of NaN, so that any use of them shows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Case:
    """Rows of each group, then rows of none."""

    sizes: tuple[int, ...]
    padding: int = 0
    inputs: int = 128
    outputs: int = 128
    dtype: str = "float32"
    weight_dtype: str | None = None
    """None: that of the rows; "bits": bfloat16 as uint16."""
    out_dtype: str = "float32"
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Rows in all."""
        return sum(self.sizes) + self.padding

    @property
    def stored_dtype(self) -> np.dtype:
        """What the weights are rounded to."""
        name = self.weight_dtype or self.dtype
        return np.dtype(jnp.bfloat16 if name == "bits" else jnp.dtype(name))

    @property
    def tolerance(self) -> float:
        """Relative to the largest magnitude of the expected output."""
        return 1e-5 if "bfloat16" not in (self.dtype, self.out_dtype) else 1e-2


def _both(**cases: Case) -> dict[str, Case]:
    """Each case in float32 and in bfloat16."""
    named = {name.replace("_", " "): case for name, case in cases.items()}
    low = {
        f"{name}, bfloat16": Case(**{**vars(case), "dtype": "bfloat16", "seed": 1})
        for name, case in named.items()
    }
    return named | low


CORNERS = _both(
    one_group=Case((40,)),
    one_row=Case((0, 1, 0)),
    no_rows_in_any_group=Case((0, 0, 0), padding=5),
    empty_groups_between=Case((0, 3, 0, 0, 9, 0), padding=4),
    groups_that_meet_within_a_tile=Case((5, 6, 7, 1, 1, 30), padding=2),
    groups_that_end_at_tiles=Case((16, 32, 0, 64), padding=16),
    one_group_over_many_tiles=Case((1, 300, 2), padding=9),
    all_in_the_last_group=Case((0, 0, 0, 33)),
    more_groups_than_rows=Case((1,) * 5 + (0,) * 40, padding=3),
    much_padding=Case((3, 4), padding=200),
    wide_inputs=Case((20, 3), inputs=2048, outputs=256, padding=1),
    wide_outputs=Case((20, 3), inputs=64, outputs=1536, padding=1),
    sizes_of_no_tile=Case((9, 3), inputs=1352, outputs=1160, padding=1),
) | {
    "bfloat16 out": Case((5, 0, 12), padding=2, dtype="bfloat16", out_dtype="bfloat16"),
    "weights as bits": Case((5, 0, 12), padding=2, dtype="bfloat16", weight_dtype="bits"),
    "float32 rows, bfloat16 weights": Case((5, 0, 12), padding=2, weight_dtype="bfloat16"),
    "float32 rows, weights as bits": Case((5, 0, 12), padding=2, weight_dtype="bits"),
}


@dataclass(frozen=True)
class Arrays:
    """A case's inputs in its dtypes, and what must come out, in float64."""

    x: Float[np.ndarray, "tokens in"]
    weights: np.ndarray
    group_sizes: Int32[np.ndarray, " groups"]
    out: Float[np.ndarray, "tokens out"]


def build(case: Case) -> Arrays:
    """Draws the case's numbers and computes its result from what their dtypes hold of them."""
    rng = np.random.default_rng(case.seed)
    x = rng.normal(size=(case.tokens, case.inputs)).astype(jnp.dtype(case.dtype))
    weights = rng.normal(size=(len(case.sizes), case.inputs, case.outputs)).astype(case.stored_dtype)
    out = np.zeros((case.tokens, case.outputs))
    first = 0
    for group, size in enumerate(case.sizes):
        rows = slice(first, first + size)
        out[rows] = x[rows].astype(np.float64) @ weights[group].astype(np.float64)
        first += size
        if size == 0:
            weights[group] = np.nan
    x[first:] = np.nan
    if case.weight_dtype == "bits":
        weights = weights.view(np.uint16)
    return Arrays(x, weights, np.asarray(case.sizes, np.int32), out)


def cases() -> "SearchStrategy[Case]":
    """Anything that the op can be asked for, small."""
    from hypothesis import strategies as st

    return st.builds(
        Case,
        sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any).map(tuple),
        padding=st.integers(0, 40),
        inputs=st.sampled_from([64, 128, 200]),
        outputs=st.sampled_from([64, 128, 200]),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        seed=st.integers(0, 99),
    )
