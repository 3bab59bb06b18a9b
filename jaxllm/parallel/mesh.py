"""The mesh that a model is laid out on. One device is a mesh of one."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxllm.wording import counted

AXES = ("stage", "data", "expert", "tensor")
"""Of every mesh, slowest first: neighbours share heads and columns, which takes a sum at each layer."""


def make_mesh(
    tensor_parallel_size: int = 1,
    devices: Sequence[Any] | None = None,
    *,
    expert_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int = 1,
) -> Mesh:
    """A mesh with the axes `stage`, `data`, `expert` and `tensor`.

    Args:
        tensor_parallel_size: devices that share each layer's heads and columns, and each expert's.
        devices: to take them from, in order; by default all there are.
        expert_parallel_size: groups of such devices that share the experts; of other layers all have a part.
        pipeline_parallel_size: groups of those, each with a run of the layers.
        data_parallel_size: data groups of one engine, which share the experts; replicas have a mesh each.

    Raises:
        ValueError: there are fewer devices than asked for.
    """
    devices = jax.devices() if devices is None else devices
    shape = (pipeline_parallel_size, data_parallel_size, expert_parallel_size, tensor_parallel_size)
    if len(devices) < math.prod(shape):
        sizes = {
            "pipeline_parallel_size": pipeline_parallel_size,
            "data_parallel_size": data_parallel_size,
            "expert_parallel_size": expert_parallel_size,
            "tensor_parallel_size": tensor_parallel_size,
        }
        asked = " * ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"{asked}: there {'is' if len(devices) == 1 else 'are'} only {counted(len(devices), 'device')} "
            f"({devices[0].platform if devices else 'none'}); ask for that many or fewer"
        )
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices[: math.prod(shape)])


def adopt_mesh(mesh: Mesh, data_parallel_size: int = 1) -> Mesh:
    """Somebody's own mesh in the form of `make_mesh`: the same devices, the axes it lacks of size one.

    Args:
        data_parallel_size: data groups that the engine is to have.

    Raises:
        ValueError: an axis that is not one of `AXES`, or a data axis of another size.
    """
    for axis in mesh.axis_names:
        if axis not in AXES:
            raise ValueError(f"mesh: axis {axis!r} is not one of {', '.join(AXES)}")
    if (found := mesh.shape.get("data", 1)) != data_parallel_size:
        raise ValueError(
            f"mesh: axis 'data' has {found} devices; set data_parallel_size={found}, for as many replicas or "
            "with data_parallel_experts for data groups, or leave that axis out"
        )
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
    shape = [mesh.shape.get(axis, 1) for axis in AXES]
    return auto_mesh(mesh.devices.transpose(order).reshape(shape))


def stage_meshes(mesh: Mesh) -> list[Mesh]:
    """The devices of each stage, as meshes of one stage."""
    return [auto_mesh(stage[None]) for stage in mesh.devices]


def auto_mesh(devices: np.ndarray) -> Mesh:
    """Auto axes: shardings of activations are found by the compiler from those of the weights."""
    return Mesh(devices, AXES, (AxisType.Auto,) * len(AXES))
