"""Where on a slice the chips of a replica's stages lie."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

Place = tuple[int, ...]
"""Coordinates of a chip in its slice."""


def stage_places(meshes: Sequence[Mesh], shape: tuple[int, ...]) -> list[list[Place]]:
    """For each stage its chips' places in a slice of that shape, in the order of its mesh.

    Devices that have no coordinates, as GPUs, are numbered along the slice.
    """
    devices = [device for mesh in meshes for device in mesh.devices.flat]
    first = min(device.id for device in devices)

    def place(device: Any) -> Place:
        coords = getattr(device, "coords", None)
        if coords is not None:
            return tuple(coords[: len(shape)])
        return tuple(map(int, np.unravel_index((device.id - first) % math.prod(shape), shape)))

    return [[place(device) for device in mesh.devices.flat] for mesh in meshes]


def stage_torus(places: Sequence[Place]) -> tuple[int, ...]:
    """Chips of a stage along each axis of the slice that it extends over; of a stage with gaps, in a row."""
    sides = [len(set(along)) for along in zip(*places, strict=True)]
    return tuple(side for side in sides if side > 1) if math.prod(sides) == len(places) else (len(places),)


def stage_hops(sender: Sequence[Place], receiver: Sequence[Place]) -> int:
    """Links from a chip to its counterpart in another stage, of the pair that is the farthest apart."""
    return max(
        sum(abs(a - b) for a, b in zip(one, other, strict=True))
        for one, other in zip(sender, receiver, strict=True)
    )
