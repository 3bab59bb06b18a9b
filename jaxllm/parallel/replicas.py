"""The meshes of a model's replicas: slices of all devices that are alike."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.config import ParallelConfig
from jaxllm.parallel.mesh import make_mesh


def replica_meshes(parallel: ParallelConfig, mesh: Mesh | None = None) -> list[Mesh]:
    """A mesh for each replica, with a `data` axis of one; other axes as they are, or as in `make_mesh`.

    Args:
        parallel: how many replicas, and how each is laid out.
        mesh: to be cut along its `data` axis; None: the first devices, in order.

    Raises:
        ValueError: there are fewer devices than asked for, or the mesh has another `data` axis.
    """
    if mesh is not None:
        return _cut(mesh, parallel.data_parallel_size)
    devices: list[Any] = jax.devices()
    size = parallel.replica_size
    wanted = parallel.data_parallel_size * size
    if wanted > len(devices):
        raise ValueError(
            f"data_parallel_size={parallel.data_parallel_size}: replicas of {size} devices "
            "(tensor_parallel_size * expert_parallel_size * pipeline_parallel_size) need "
            f"{wanted}, and there are {len(devices)} ({devices[0].platform}); lower one of these"
        )
    return [
        make_mesh(
            parallel.tensor_parallel_size,
            devices[first : first + size],
            expert_parallel_size=parallel.expert_parallel_size,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
        )
        for first in range(0, wanted, size)
    ]


def _cut(mesh: Mesh, data_parallel_size: int) -> list[Mesh]:
    if (found := mesh.shape.get("data", 1)) != data_parallel_size:
        raise ValueError(
            f"mesh: its axis data has the size {found}; it must be data_parallel_size={data_parallel_size}"
        )
    parts = np.split(mesh.devices, data_parallel_size, axis=mesh.axis_names.index("data"))
    return [Mesh(part, mesh.axis_names, axis_types=mesh.axis_types) for part in parts]
