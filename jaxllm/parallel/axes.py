"""Logical axes of parameters and activations, and the axes of the mesh that share them out."""

from collections.abc import Callable, Sequence

from jax.sharding import PartitionSpec

Axes = tuple[str | None, ...]
"""A name for each axis of an array; None where the axis has none and is never cut."""

EVERY_DEVICE = ("expert", "tensor")
"""The mesh's axes that share what every layer has: a data group's devices. Only experts are cut along one of
them alone, and over all data groups."""

DATA_GROUPS = "data"
"""The mesh's axis that shares out requests, where an engine has several data groups; of size one elsewhere.
Its programs run under `shard_map` over this axis: each group's part is the program of an engine alone, and
from group to group goes only what a layer sends."""

MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "vocab": EVERY_DEVICE,
    "heads": EVERY_DEVICE,
    "kv_heads": EVERY_DEVICE,
    "mlp": EVERY_DEVICE,
    "experts": (DATA_GROUPS, "expert"),
    "expert_mlp": "tensor",
    "copies": None,
    "embed": None,
    "positions": None,
    "requests": DATA_GROUPS,
}
"""Of each logical axis. Along `requests` the rows, tokens or pages of all data groups follow one another."""


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Where each axis lives on the mesh.

    Raises:
        ValueError: an axis that the table does not have.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in MESH_AXES]
    if unknown:
        raise ValueError(f"axes={tuple(axes)!r}: {unknown[0]!r} is not one of {', '.join(MESH_AXES)}")
    return PartitionSpec(*(None if axis is None else MESH_AXES[axis] for axis in axes))


def within_group(spec: PartitionSpec) -> PartitionSpec:
    """The part of a spec that tells how a data group's own part is cut over the group's devices."""
    return PartitionSpec(*(_keep(axis, lambda name: name != DATA_GROUPS) for axis in spec))


def over_groups(spec: PartitionSpec) -> PartitionSpec:
    """The part of a spec that tells which axis is shared out over the data groups."""
    return PartitionSpec(*(_keep(axis, lambda name: name == DATA_GROUPS) for axis in spec))


def _keep(axis: str | tuple[str, ...] | None, kept: Callable[[str], bool]) -> tuple[str, ...] | None:
    names = (axis,) if isinstance(axis, str) else axis or ()
    return tuple(name for name in names if kept(name)) or None
