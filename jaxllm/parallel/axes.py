"""Logical axes of parameters and activations, and the axes of the mesh that share them out."""

from collections.abc import Sequence

from jax.sharding import PartitionSpec

Axes = tuple[str | None, ...]
"""A name for each axis of an array; None where the axis has none and is never cut."""

EVERY_DEVICE = ("expert", "tensor")
"""The mesh's axes that share what every layer has. Only experts are cut along one of them alone."""

MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "vocab": EVERY_DEVICE,
    "heads": EVERY_DEVICE,
    "kv_heads": EVERY_DEVICE,
    "mlp": EVERY_DEVICE,
    "experts": "expert",
    "expert_mlp": "tensor",
    "copies": None,
    "embed": None,
    "positions": None,
}


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Where each axis lives on the mesh.

    Raises:
        ValueError: an axis that the table does not have.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in MESH_AXES]
    if unknown:
        raise ValueError(f"axes={tuple(axes)!r}: {unknown[0]!r} is not one of {', '.join(MESH_AXES)}")
    return PartitionSpec(*(None if axis is None else MESH_AXES[axis] for axis in axes))
