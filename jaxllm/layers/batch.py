"""What every layer needs to know about a step."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32, Shaped

from pallas_kernels.paged_attention import Backend, RaggedBatch

Cache = tuple[Shaped[Array, "..."], ...]
"""Pools of pages, each packed as the attention backend likes it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """The tokens of one step, flat, decode rows first.

    Attributes:
        positions: each token's place in its sequence.
        groups: where the keys of each cache group lie; layers of one kind share page ids and so a group.
        slots: for each layer its group, and the index of its pool in the cache. Static.
        backend: the attention kernel. Static.
        expert_load: layers with experts append how many tokens went to each, or to each of its copies, while
            a step is traced; None where nobody asks. Static.
        first_layer: number of the layer that the first slot is for. Static.
    """

    positions: Int[Array, " tokens"]
    groups: tuple[RaggedBatch, ...]
    slots: tuple[tuple[int, int], ...] = field(metadata={"static": True})
    backend: Backend = field(metadata={"static": True})
    expert_load: list[Int32[Array, " slots"]] | None = field(default=None, metadata={"static": True})
    first_layer: int = field(default=0, metadata={"static": True})

    def slot(self, layer: int) -> tuple[int, int]:
        """The slot of the layer of that number."""
        return self.slots[layer - self.first_layer]

    @property
    def used(self) -> Bool[Array, " tokens"]:
        """Which tokens are of a row; those after them fill the step's program up."""
        return jnp.arange(len(self.positions)) < self.groups[0].query_start[-1]
