"""The meshes of a model's replicas: slices of all devices that are alike."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.parallel.mesh import make_mesh


def replica_meshes(
    data_parallel_size: int, tensor_parallel_size: int, mesh: Mesh | None = None
) -> list[Mesh]:
    """A mesh for each replica, with the axes of `make_mesh` and a `data` axis of one.

    Args:
        data_parallel_size: how many replicas.
        tensor_parallel_size: devices of each.
        mesh: to be cut along its `data` axis; None: the first devices, in order.

    Raises:
        ValueError: there are fewer devices than asked for, or the mesh has another `data` axis.
    """
    if mesh is not None:
        return _cut(mesh, data_parallel_size)
    devices: list[Any] = jax.devices()
    wanted = data_parallel_size * tensor_parallel_size
    if wanted > len(devices):
        raise ValueError(
            f"data_parallel_size={data_parallel_size}: replicas of {tensor_parallel_size} devices "
            f"(tensor_parallel_size) need {wanted}, and there are {len(devices)} ({devices[0].platform}); "
            "lower one of the two"
        )
    return [
        make_mesh(tensor_parallel_size, devices[first : first + tensor_parallel_size])
        for first in range(0, wanted, tensor_parallel_size)
    ]


def _cut(mesh: Mesh, data_parallel_size: int) -> list[Mesh]:
    if mesh.shape["data"] != data_parallel_size:
        raise ValueError(
            f"mesh: its axis data has the size {mesh.shape['data']}; it must be data_parallel_size="
            f"{data_parallel_size}"
        )
    parts = np.split(mesh.devices, data_parallel_size, axis=mesh.axis_names.index("data"))
    return [Mesh(part, mesh.axis_names, axis_types=mesh.axis_types) for part in parts]
