"""Meshes of devices, and the one table that lays logical axes over them."""

from jaxllm.parallel.axes import EVERY_DEVICE, Axes, partition_spec
from jaxllm.parallel.mesh import adopt_mesh, make_mesh, stage_meshes
from jaxllm.parallel.replicas import replica_meshes

__all__ = [
    "EVERY_DEVICE",
    "Axes",
    "adopt_mesh",
    "make_mesh",
    "partition_spec",
    "replica_meshes",
    "stage_meshes",
]
