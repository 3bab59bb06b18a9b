"""Weights that are kept in the form that a processor's products read."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.packed_matmul import Backend, Panels, pack, packed_matmul, take_outputs


@dataclass(frozen=True)
class Packing:
    """A weight `[*inputs, *outputs]`, or one of two axes with the outputs first, as panels.

    Attributes:
        inputs: the axes that products sum over: the first ones, or the last.
        shape: of the weight before it was packed.
        backend: of the products.
    """

    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    backend: Backend

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sizes of the axes that a product makes."""
        return tuple(size for axis, size in enumerate(self.shape) if axis not in self.inputs)

    def pack(self, weight: Float[Array, "..."]) -> Panels:
        """The weight in panels."""
        size = prod(self.outputs)
        matrix = weight.reshape(-1, size) if self.inputs[0] == 0 else weight.reshape(size, -1).T
        return pack(matrix)

    def multiply(
        self, x: Float[Array, "tokens *inputs"], panels: Panels, out_dtype: DTypeLike
    ) -> Float[Array, "tokens *outputs"]:
        """Products of tokens with the weight, summed in float32 and rounded once."""
        rows = x.reshape(len(x), -1)
        y = packed_matmul(
            rows, panels, outputs=prod(self.outputs), out_dtype=out_dtype, backend=self.backend
        )
        return y.reshape(len(x), *self.outputs)

    def take(self, panels: Panels, ids: Int[Array, " n"]) -> Float[Array, "n inputs"]:
        """What leads to each of the outputs `ids`, which are to be in range."""
        return take_outputs(panels, ids, prod(self.shape[axis] for axis in self.inputs))


def pack_parameter(weight: nnx.Param[Array], inputs: Sequence[int], backend: Backend) -> nnx.Param[Array]:
    """The parameter in panels; its metadata say how it was packed.

    Raises:
        NotImplementedError: weights of its dtype are not packed.
    """
    packing = Packing(tuple(inputs), tuple(weight.shape), backend)
    return nnx.Param(packing.pack(weight[...]), **weight.get_metadata(), packing=packing)


def packing_of(weight: nnx.Param[Array]) -> Packing | None:
    """How a parameter is packed, if it is."""
    return weight.get_metadata().get("packing")


class Packable(nnx.Module):
    """A layer whose weight can be kept in panels."""

    def pack(self, backend: Backend) -> None:
        """Keeps the weight in panels from now on, and multiplies with `backend`.

        Raises:
            NotImplementedError: weights of its dtype are not packed.
        """
        raise NotImplementedError


def pack_layers(model: nnx.Module, backend: Backend) -> None:
    """Packs the weight of every layer that can be."""
    for _, module in nnx.iter_graph(model):
        if isinstance(module, Packable):
            module.pack(backend)
