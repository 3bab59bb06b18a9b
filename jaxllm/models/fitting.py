"""Whether a checkpoint fits a model, and one array into its shards."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from converters.errors import CheckpointError
from jaxllm.models.abstract import Parameter

Shape = tuple[int, ...]


def made_shape(transform: Callable[[list[np.ndarray]], np.ndarray], shapes: Sequence[Shape]) -> Shape | None:
    """The shape that a transform makes of sources of these shapes, or None where it refuses them.

    It is tried on arrays of one byte an element, which take no memory until the transform copies them.
    """
    try:
        return transform([np.broadcast_to(np.int8(0), shape) for shape in shapes]).shape
    except (ValueError, IndexError):
        return None


def refuse_misfits(
    path: Path, *, missing: Sequence[str], left_over: Sequence[str], wrong_shape: Sequence[str]
) -> None:
    """Raises one error for all that does not fit, if anything does not.

    Raises:
        CheckpointError: with every name.
    """
    problems = {"missing": missing, "left over": left_over, "of the wrong shape": wrong_shape}
    lines = [f"  {len(names)} {kind}: {'; '.join(names)}" for kind, names in problems.items() if names]
    if lines:
        raise CheckpointError("\n".join([f"{path}: its tensors do not fit the model:", *lines]))


def place(array: np.ndarray, parameter: Parameter, mesh: Mesh) -> Array:
    """Copies each device's part to it, and waits, so that the host's copy can go."""
    sharding = parameter.sharding(mesh)
    placed = jax.make_array_from_callback(parameter.shape, sharding, lambda part: array[part])
    return parameter.keep(placed, mesh).block_until_ready()
