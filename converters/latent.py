"""Transforms for latent attention: `rotated` dimensions of a head have positions, the `plain` ones have none.

Checkpoints rotate neighbours, (0, 1), (2, 3), ...; the engine rotates halves against each other. So of the
rotated dimensions the even ones come first, in queries and keys alike: their products stay as they are.
"""

from collections.abc import Sequence

import numpy as np

from converters.rules import Geometry


def queries(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """`[heads * (plain + rotated), inputs]` to `[inputs, heads, plain + rotated]`."""
    heads = arrays[0].reshape(geometry.num_heads, -1, arrays[0].shape[1])
    return _neighbours_to_halves(heads.transpose(2, 0, 1), geometry)


def latents(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """What makes the latent and the rotated part of the key: `[latent + rotated, embed]`, transposed."""
    return _neighbours_to_halves(arrays[0].T, geometry)


def keys(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """What makes keys: of `[heads * (plain + value), latent]` the part `[heads, plain, latent]`."""
    return _by_head(arrays[0], geometry)[:, : geometry.plain_dim]


def values(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """The values' part of the same: `[heads, latent, value]`."""
    return _by_head(arrays[0], geometry)[:, geometry.plain_dim :].swapaxes(1, 2)


def output(arrays: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
    """`[embed, heads * value]` to `[heads, value, embed]`."""
    return arrays[0].T.reshape(geometry.num_heads, -1, arrays[0].shape[0])


def _by_head(array: np.ndarray, geometry: Geometry) -> np.ndarray:
    return array.reshape(geometry.num_heads, -1, array.shape[1])


def _neighbours_to_halves(array: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Of the last axis, whose end is rotated."""
    plain, rotated = np.split(array, [-geometry.rotated_dim], axis=-1)
    return np.concatenate([plain, rotated[..., ::2], rotated[..., 1::2]], axis=-1)
