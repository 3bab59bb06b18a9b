"""Meshes of devices, and the one table that lays logical axes over them."""

from jaxllm.parallel.axes import (
    DATA_GROUPS,
    EVERY_DEVICE,
    Axes,
    over_groups,
    partition_spec,
    within_group,
)
from jaxllm.parallel.mesh import adopt_mesh, make_mesh, stage_meshes
from jaxllm.parallel.replicas import replica_meshes
from jaxllm.parallel.sharing import share_over

__all__ = [
    "DATA_GROUPS",
    "EVERY_DEVICE",
    "Axes",
    "adopt_mesh",
    "make_mesh",
    "over_groups",
    "partition_spec",
    "replica_meshes",
    "share_over",
    "stage_meshes",
    "within_group",
]
