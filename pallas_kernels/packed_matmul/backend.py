"""What a backend of the product with a packed weight is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.packed_matmul.norm import Norm
from pallas_kernels.packed_matmul.panels import Gate
from pallas_kernels.packed_matmul.problem import Problem
from pallas_kernels.registry import do_nothing, serves_all


class PackedMatmulFunction(Protocol):
    """What a backend implements: `packed_matmul` less its `backend` argument."""

    def __call__(
        self,
        x: Array,
        weight: Array,
        /,
        *,
        outputs: int,
        gate: Gate | None,
        norm: Norm | None,
        residual: Array | None,
        out_dtype: DTypeLike,
    ) -> Array: ...


@dataclass(frozen=True)
class Backend:
    """A way to compute the op.

    Attributes:
        require: raises NotImplementedError, with the reason, for a problem that is not served.
        prepare: starts what takes time before `require` can answer; returns at once.
        interpreted: the same kernel on the CPU, where `multiply` needs an accelerator.
    """

    name: str
    multiply: PackedMatmulFunction
    require: Callable[[Problem], None] = serves_all
    prepare: Callable[[], None] = do_nothing
    interpreted: PackedMatmulFunction | None = None
