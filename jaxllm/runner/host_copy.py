"""Arrays in the host's memory: of each its shards that are on this host's devices."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array

Key = tuple[tuple[int | None, int | None], ...]


@dataclass(frozen=True)
class HostCopy:
    """One array's shards, each of them once."""

    shape: tuple[int, ...]
    sharding: Sharding
    shards: dict[Key, np.ndarray]
    """By where they begin and end on each axis."""

    @classmethod
    def of(cls, array: Array) -> "HostCopy":
        """Copies what this host's devices hold."""
        shards: dict[Key, np.ndarray] = {}
        for shard in array.addressable_shards:
            key = _key(shard.index)
            if key not in shards:
                shards[key] = np.array(shard.data)
        return cls(array.shape, array.sharding, shards)

    def upload(self) -> Array:
        """The array, on the devices where it was."""
        return jax.make_array_from_callback(
            self.shape, self.sharding, lambda index: self.shards[_key(index or ())]
        )


def _key(index: tuple[slice, ...]) -> Key:
    return tuple((part.start, part.stop) for part in index)
