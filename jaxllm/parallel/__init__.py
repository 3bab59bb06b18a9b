"""Meshes of devices, and the one table that lays logical axes over them."""

from jaxllm.parallel.axes import Axes, partition_spec
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.replicas import replica_meshes

__all__ = ["Axes", "make_mesh", "partition_spec", "replica_meshes"]
