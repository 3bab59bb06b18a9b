"""Experts whose weights are kept more than once, and weights on their way from slot to slot."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int32, Shaped

from jaxllm.layers.expert_exchange import AXIS
from jaxllm.layers.expert_rows import count_rows
from jaxllm.layers.parameter import parameter
from jaxllm.parallel.placement import Placement

TABLE = (None, "copies")
"""Logical axes of a table."""


@dataclass(frozen=True)
class Copies:
    """How many weights of experts there are; see `jaxllm.parallel.placement` for where.

    Attributes:
        experts: of a layer.
        redundant: how many more slots there are than experts.
        devices: that share the slots.
    """

    experts: int
    redundant: int
    devices: int

    @property
    def slots(self) -> int:
        """Of all devices."""
        return self.experts + self.redundant

    @property
    def most(self) -> int:
        """Copies that an expert may have. Of two on one device one would be for nothing."""
        return min(self.redundant + 1, self.devices)

    def even(self, layers: int) -> Placement:
        """Where the experts are at first."""
        return Placement.even(layers, self.experts, self.slots, self.devices)

    def even_table(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Initializer of a table."""
        return jnp.asarray(self.even(1).tables(self.most)[0].reshape(shape), dtype)


class ExpertCopies(nnx.Module):
    """The slots of each expert, among which its tokens take turns.

    The table is an array among the weights, so that experts can be placed anew between two steps, and the
    programs stay as they are.
    """

    def __init__(self, copies: Copies, *, rngs: nnx.Rngs) -> None:
        shape = (copies.experts, copies.most)
        self.table = parameter(shape, TABLE, jnp.dtype("int32"), rngs, copies.even_table)

    def __call__(
        self,
        experts: Int32[Array, "tokens chosen"],
        used: Bool[Array, " tokens"],
        turn: Int32[Array, ""] | int = 0,
    ) -> Int32[Array, "tokens chosen"]:
        """A slot for each expert that a token goes to.

        The tokens of an expert go to one copy after the other, in the order of the batch: no copy gets more
        than one token more than another. With data groups that holds for each group's tokens.

        Args:
            used: which tokens there are; others take no turns, and get any slots.
            turn: which copy is the first. Where an expert has one token a step, the same copy would always
                get it otherwise.
        """
        table = self.table[...]
        expert = jnp.where(used[:, None], experts, len(table)).reshape(-1)
        tokens = count_rows(expert, len(table))
        # each one's place among those of its expert, which a stable sort keeps in the order of the batch
        place = jnp.argsort(jnp.argsort(expert, stable=True))
        place -= (jnp.cumsum(tokens) - tokens).at[expert].get(mode="clip")
        copies = (table >= 0).sum(axis=1, dtype=jnp.int32).at[expert].get(mode="clip")
        # not all experts with their first copies at once: those are on the first devices
        slots = table.at[expert, (place + expert + turn) % copies].get(mode="clip")
        return slots.reshape(experts.shape)


def gather_slots(
    weight: Shaped[Array, "before ..."], source: Int32[Array, " after"], *, sharding: NamedSharding
) -> Shaped[Array, "after ..."]:
    """Experts' weights in other slots: number `i` of what is returned was number `source[i]`.

    What is on a device already is copied there. Others come one by one, by a sum over the devices to which
    all but the owner add zeros: a device holds its old slots, its new ones, and one expert more.

    Args:
        sharding: of both; the devices of the axes `data` and `expert` share the slots.
    """
    mesh = sharding.mesh
    devices = math.prod(mesh.shape[axis] for axis in AXIS)

    def part(held: Array, source: Array) -> Array:
        me, own = jax.lax.axis_index(AXIS), len(source) // devices
        mine = jax.lax.dynamic_slice_in_dim(source, me * own, own)
        taken = held.at[mine - me * len(held)].get(mode="clip")  # those of other devices are replaced below
        away = source // len(held) != jnp.arange(len(source)) // own
        order = jnp.argsort(~away, stable=True)

        def bring(index: Array, taken: Array) -> Array:
            slot = order[index]
            owner, place = source[slot] // len(held), source[slot] % len(held)
            row = jax.lax.psum(jnp.where(owner == me, held[place], 0), AXIS)
            target = slot % own
            return taken.at[target].set(jnp.where(slot // own == me, row, taken[target]))

        return jax.lax.fori_loop(0, away.sum(), bring, taken)

    return jax.shard_map(
        part, mesh=mesh, in_specs=(sharding.spec, jax.sharding.PartitionSpec()), out_specs=sharding.spec
    )(weight, source)
