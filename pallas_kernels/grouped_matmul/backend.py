"""What a backend of the grouped product is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.grouped_matmul.problem import Problem
from pallas_kernels.registry import serves_all
from pallas_kernels.tuning import Tunable


class GroupedMatmulFunction(Protocol):
    """What a backend implements: `grouped_matmul` less its `backend` argument."""

    def __call__(self, x: Array, weights: Array, group_sizes: Array, /, *, out_dtype: DTypeLike) -> Array: ...


@dataclass(frozen=True)
class Backend:
    """A way to compute the op.

    Attributes:
        require: raises NotImplementedError, with the reason, for a problem that is not served.
        interpreted: the same kernel on the CPU, where `multiply` needs an accelerator.
        tunable: what `python -m pallas_kernels tune` may choose; None: nothing.
    """

    name: str
    multiply: GroupedMatmulFunction
    require: Callable[[Problem], None] = serves_all
    interpreted: GroupedMatmulFunction | None = None
    tunable: Tunable | None = None
