"""Models without arrays: what they are made of, and how arrays become a model again.

A model is defined as an nnx module and run as a flat tuple of arrays. `split` says which arrays those are
without making any; whoever loads weights makes them, each in its sharding; `merge` gives the module inside a
traced step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxllm.layers.packing import Bits, Joined, Packing, join_layers, join_weight, pack_layers, pack_weight
from jaxllm.layers.parameter import Initializer
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.parallel import Axes, partition_spec
from pallas_kernels.packed_matmul import Backend


@dataclass(frozen=True)
class Parameter:
    """An array that a model is made of.

    Attributes:
        shape: of the whole, before it is cut over devices or packed.
        axes: the logical axes' names.
        initializer: how random weights are made.
        packing: how the model keeps it, where that is not as it is.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: Axes
    initializer: Initializer
    packing: Packing | Bits | Joined | None = None

    @property
    def nbytes(self) -> int:
        """Size of the whole, in bytes."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """How it is cut over the devices of a mesh."""
        return NamedSharding(mesh, partition_spec(self.axes))

    def keep(self, array: Array, mesh: Mesh) -> Array:
        """The array, made in its sharding on the mesh, in the form that the model keeps."""
        if isinstance(self.packing, Joined):
            return join_weight(array, self.packing, mesh)
        return array if self.packing is None else pack_weight(array, self.packing)

    def kept(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        """What `keep` gives: shape, dtype and sharding."""
        array = jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding(mesh))
        if self.packing is None:
            return array
        packed = jax.eval_shape(partial(self.keep, mesh=mesh), array)
        spec = partition_spec(self.packing.kept_axes) if isinstance(self.packing, Joined) else PartitionSpec()
        return jax.ShapeDtypeStruct(packed.shape, packed.dtype, sharding=NamedSharding(mesh, spec))


@dataclass(frozen=True)
class Structure:
    """Everything of a model but its arrays."""

    graphdef: nnx.GraphDef[CausalLM]
    state: nnx.State[Any, Any]


class _OneKey(nnx.Rngs):
    """Gives every parameter the same key, which is of no use: only shapes are wanted.

    `nnx.Rngs` counts its keys in a variable, and to write one under a trace takes jax 7 ms.
    """

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def __getattr__(self, name: str) -> Any:
        return lambda: self._key


def split(
    model: type[CausalLM], config: DecoderConfig, products: Backend | None = None
) -> tuple[Structure, dict[str, Parameter]]:
    """A model's structure and its parameters, by their dotted paths, in the order that `merge` takes them.

    Args:
        products: what multiplies with weights, which are packed for it; None: XLA.

    Raises:
        NotImplementedError: weights of the model's dtype are not packed.
    """

    def make() -> CausalLM:
        made = model(config, rngs=_OneKey())
        if products is None:
            join_layers(made)
        else:
            pack_layers(made, products)
        return made

    graphdef, state = nnx.split(nnx.eval_shape(make))
    parameters = {}
    for path, variable in nnx.to_flat_state(state):
        array: jax.ShapeDtypeStruct = variable.get_value()
        about = variable.get_metadata()
        packing: Packing | Bits | Joined | None = about.get("packing")
        name = ".".join(map(str, path))
        parameters[name] = Parameter(
            array.shape if packing is None else packing.shape,
            jnp.dtype(config.dtype if packing is not None else array.dtype),
            about["axes"],
            about["initializer"],
            packing,
        )
    return Structure(graphdef, state), parameters


def merge(structure: Structure, leaves: Sequence[Array]) -> CausalLM:
    """The module with these arrays, in the order of `split`'s parameters."""
    return nnx.merge(structure.graphdef, jax.tree.unflatten(jax.tree.structure(structure.state), leaves))


def materialize(
    parameters: Mapping[str, Parameter], mesh: Mesh | Mapping[str, Mesh], seed: int
) -> tuple[Array, ...]:
    """Random weights, each made on the devices that hold it, in the order that `merge` takes them.

    Args:
        mesh: of all or of each parameter by its path; those without are left out.
    """
    meshes = dict.fromkeys(parameters, mesh) if isinstance(mesh, Mesh) else mesh
    keys = jax.random.split(jax.random.key(seed), len(parameters))
    kinds = [
        (key, (parameter, meshes[path]))
        for key, (path, parameter) in zip(keys, parameters.items(), strict=True)
        if path in meshes
    ]
    make = {kind: _maker(*kind) for kind in dict.fromkeys(kind for _, kind in kinds)}
    return tuple(make[kind](key) for key, kind in kinds)


def _maker(parameter: Parameter, mesh: Mesh) -> Callable[[Array], Array]:
    """One program for all parameters of a kind: a model has hundreds, of a dozen kinds."""

    def make(key: Array) -> Array:
        return parameter.initializer(key, parameter.shape, parameter.dtype)

    made = jax.jit(make, out_shardings=parameter.sharding(mesh))
    return lambda key: parameter.keep(made(key), mesh)
