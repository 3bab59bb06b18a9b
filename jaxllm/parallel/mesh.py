"""The mesh that a model is laid out on. One device is a mesh of one."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh


def make_mesh(tensor_parallel_size: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `data` (of size one) and `tensor`.

    Args:
        tensor_parallel_size: devices that share each layer's heads and columns.
        devices: to take them from, in order; by default all there are.

    Raises:
        ValueError: there are fewer devices than asked for.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size}: there are only {len(devices)} devices "
            f"({devices[0].platform if devices else 'none'}); ask for that many or fewer"
        )
    # Auto axes: shardings of activations are found by the compiler from those of the weights.
    return jax.make_mesh(
        (1, tensor_parallel_size),
        ("data", "tensor"),
        (AxisType.Auto, AxisType.Auto),
        devices=devices[:tensor_parallel_size],
    )
