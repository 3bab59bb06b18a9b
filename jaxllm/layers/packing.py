"""Weights that are kept in the form that products read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt16

from jaxllm.parallel import Axes, partition_spec
from pallas_kernels.devices import current_device
from pallas_kernels.packed_matmul import (
    Backend,
    Gate,
    Norm,
    Panels,
    pack,
    pack_gated,
    packed_matmul,
    take_outputs,
)

LANES = 128
"""Of a TPU's tile."""


@dataclass(frozen=True)
class Packing:
    """A weight `[*inputs, *outputs]`, or one of two axes with the outputs first, as panels.

    Attributes:
        inputs: the axes that products sum over: the first ones, or the last.
        shape: of the weight before it was packed.
        backend: of the products.
        gate: for a weight `[inputs, 2, outputs]`: its first half is a gate, and products come gated.
    """

    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    backend: Backend
    gate: Gate | None = None

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sizes of the axes that a product makes."""
        outputs = tuple(size for axis, size in enumerate(self.shape) if axis not in self.inputs)
        return outputs if self.gate is None else outputs[1:]

    def pack(self, weight: Float[Array, "..."]) -> Panels:
        """The weight in panels."""
        if self.gate is not None:
            return pack_gated(weight)
        size = prod(self.outputs)
        matrix = weight.reshape(-1, size) if self.inputs[0] == 0 else weight.reshape(size, -1).T
        return pack(matrix)

    def multiply(
        self,
        x: Float[Array, "tokens *inputs"],
        panels: Panels,
        out_dtype: DTypeLike,
        *,
        norm: Norm | None = None,
        residual: Float[Array, "tokens *outputs"] | None = None,
    ) -> Float[Array, "tokens *outputs"]:
        """Products of tokens with the weight, summed in float32 and rounded once.

        Args:
            norm: of the tokens, before.
            residual: added to the products, of `out_dtype`.
        """
        rows, size = x.reshape(len(x), -1), prod(self.outputs)
        added = None if residual is None else residual.reshape(len(x), size)
        options = {"outputs": size, "gate": self.gate, "norm": norm, "residual": added}
        out = packed_matmul(rows, panels, out_dtype=out_dtype, backend=self.backend, **options)
        return out.reshape(len(x), *self.outputs)

    def take(self, panels: Panels, ids: Int[Array, " n"]) -> Float[Array, "n inputs"]:
        """What leads to each of the outputs `ids`, which are to be in range."""
        return take_outputs(panels, ids, prod(self.shape[axis] for axis in self.inputs))


@dataclass(frozen=True)
class Bits:
    """A weight of bfloat16 as its bits, which XLA on CPU does not turn into float32 where it takes a part."""

    shape: tuple[int, ...]

    def pack(self, weight: Float[Array, "..."]) -> UInt16[Array, "..."]:
        """The weight's bits."""
        return jax.lax.bitcast_convert_type(weight, jnp.uint16)


@dataclass(frozen=True)
class Joined:
    """A weight `[experts, inputs, parts, outputs]` with the parts of each device side by side.

    TPUs keep an array in tiles of its last two axes. To join these in a step would be to copy the weight: in
    a layer of Qwen3-235B over 16 chips 201 MB, which takes as long as reading them twice. And a weight whose
    outputs are no whole tiles XLA would keep transposed, and copy as well.

    Attributes:
        axes: the logical axes' names of the weight before.
        tile: what a device has is filled up with zeros to whole tiles of so many outputs.
    """

    shape: tuple[int, ...]
    axes: Axes
    tile: int = 1

    @property
    def kept_axes(self) -> Axes:
        """Of the weight as it is kept."""
        return (*self.axes[:2], self.axes[3])

    def join(
        self, weight: Shaped[Array, "experts inputs parts outputs"]
    ) -> Shaped[Array, "experts inputs joined"]:
        """What a device has of the weight, joined."""
        flat = weight.reshape(*weight.shape[:2], -1)
        return jnp.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % self.tile)))


@partial(jax.jit, static_argnums=(1, 2))
def join_weight(
    weight: Shaped[Array, "experts inputs parts outputs"], joined: Joined, mesh: Mesh | AbstractMesh
) -> Shaped[Array, "experts inputs joined"]:
    """The weight as it is kept, on each device of the mesh its part."""
    before, after = partition_spec(joined.axes), partition_spec(joined.kept_axes)
    return jax.shard_map(joined.join, mesh=mesh, in_specs=before, out_specs=after)(weight)


@partial(jax.jit, static_argnums=1)
def pack_weight(weight: Float[Array, "..."], packing: Packing | Bits) -> Array:
    """The weight as it is kept; one program for all weights that are kept alike."""
    return packing.pack(weight)


def pack_parameter(
    weight: nnx.Param[Array], inputs: Sequence[int], backend: Backend, gate: Gate | None = None
) -> nnx.Param[Array]:
    """The parameter in panels; its metadata say how it was packed.

    Raises:
        NotImplementedError: weights of its dtype are not packed.
    """
    packing = Packing(tuple(inputs), tuple(weight.shape), backend, gate)
    return nnx.Param(pack_weight(weight[...], packing), **weight.get_metadata(), packing=packing)


def keep_as_bits(weight: nnx.Param[Array]) -> nnx.Param[Array]:
    """The parameter of bfloat16 as its bits; its metadata say so."""
    packing = Bits(tuple(weight.shape))
    return nnx.Param(pack_weight(weight[...], packing), **weight.get_metadata(), packing=packing)


def join_parts(weight: nnx.Param[Array]) -> nnx.Param[Array]:
    """The parameter of several parts with these side by side; its metadata say so."""
    about = weight.get_metadata()
    tile = LANES if current_device()[0] == "tpu" else 1
    joined, mesh = Joined(tuple(weight.shape), about["axes"], tile), jax.sharding.get_abstract_mesh()
    array = joined.join(weight[...]) if mesh.empty else join_weight(weight[...], joined, mesh)
    return nnx.Param(array, **about, packing=joined)


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

    def join(self) -> None:
        """Keeps the weight as XLA and kernels for accelerators read it; most are so from the start."""


def pack_layers(model: nnx.Module, backend: Backend) -> None:
    """Packs the weight of every layer that can be."""
    for _, module in nnx.iter_graph(model):
        if isinstance(module, Packable):
            module.pack(backend)


def join_layers(model: nnx.Module) -> None:
    """Joins the weight of every layer where it has parts to be joined."""
    for _, module in nnx.iter_graph(model):
        if isinstance(module, Packable):
            module.join()
