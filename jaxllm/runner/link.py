"""Hidden states on their way from a stage to the next one, which is on other hosts."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, Float

from jaxllm.parallel.stage_hosts import joined_mesh
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.programs import Programs


@dataclass(frozen=True)
class LinkLowering:
    """The programs between two stages, one for each size of a step. Both sides' hosts start them.

    Attributes:
        own: the stage on this host.
        other: the devices of its neighbour.
        receives: whether this host has the later of the two.
    """

    own: Lowering
    other: Mesh
    receives: bool

    @cached_property
    def sharding(self) -> NamedSharding:
        """What leaves the one stage and what comes to the other, one after the other in one array."""
        here = self.own.mesh
        mesh = joined_mesh(self.other, here) if self.receives else joined_mesh(here, self.other)
        return NamedSharding(mesh, PartitionSpec("stage", *self.own.in_parts.spec[1:]))

    def shape(self, tokens: int) -> tuple[int, int]:
        """Of that array."""
        return 2 * tokens, self.own.model.hidden_size

    def key(self, tokens: int) -> Hashable:
        """A program's name, the same on both sides."""
        later = self.own.stage.index + (not self.receives)
        return (later, ("link", tokens))

    @property
    def programs(self) -> dict[Hashable, Callable[[], Lowered]]:
        """The closed set, by key, from large to small."""
        sizes = dict.fromkeys(bucket.tokens for bucket in self.own.buckets.sizes[::-1])
        return {self.key(tokens): partial(self.lower, tokens) for tokens in sizes}

    @property
    def first_programs(self) -> list[Hashable]:
        """Those of the steps that `Lowering.first_programs` is for."""
        return [self.key(bucket.tokens) for bucket in self.own.first_buckets]

    def lower(self, tokens: int) -> Lowered:
        """Each device of the earlier stage sends its part to the one in its place of the later."""
        spec = self.sharding.spec
        move = jax.shard_map(
            partial(lax.ppermute, axis_name="stage", perm=[(0, 1)]),
            mesh=self.sharding.mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,  # the other axes have copies where the width cannot be shared evenly
        )
        both = jax.ShapeDtypeStruct(self.shape(tokens), self.own.model.dtype, sharding=self.sharding)
        return jax.jit(move, out_shardings=self.sharding).lower(both)


class Link:
    """Runs these programs. It starts them and returns before they are done.

    All links go from a stage to the next, and every host starts the programs of a step before those of the
    next step, stage by stage: so there is one order of all, and no two hosts wait for each other.

    Args:
        lowering: what the programs are made of.
        programs: those of this host.
    """

    def __init__(self, lowering: LinkLowering, programs: Programs) -> None:
        self._lowering = lowering
        self._programs = programs
        self._nothing: dict[int, Array] = {}
        """What a receiver puts in, by the tokens of a step; twice the largest of them together."""

    def is_ready(self, bucket: Bucket) -> bool:
        """Whether the program for such a step is there."""
        return self._lowering.key(bucket.tokens) in self._programs

    def send(self, bucket: Bucket, hidden: Float[Array, "tokens embed"]) -> Array:
        """Sends hidden states on; what it gives is there when that is done."""
        return self._run(bucket, hidden)

    def receive(self, bucket: Bucket) -> Float[Array, "tokens embed"]:
        """Takes hidden states, in the parts that `Lowering.entering` says."""
        nothing = self._nothing.get(bucket.tokens)
        if nothing is None:
            nothing = self._nothing[bucket.tokens] = self._make_nothing(bucket.tokens)
        return self._run(bucket, nothing)

    def free(self) -> None:
        """Drops what it has on the devices."""
        self._nothing.clear()

    def _run(self, bucket: Bucket, own: Array) -> Array:
        lowering = self._lowering
        parts = [shard.data for shard in own.addressable_shards]
        shape = lowering.shape(bucket.tokens)
        both = jax.make_array_from_single_device_arrays(shape, lowering.sharding, parts)
        moved = self._programs[lowering.key(bucket.tokens)](both)
        parts = [shard.data for shard in moved.addressable_shards]
        return jax.make_array_from_single_device_arrays(own.shape, lowering.own.in_parts, parts)

    def _make_nothing(self, tokens: int) -> Array:
        whole = self._lowering.own.hidden_in_parts(tokens)
        assert whole.sharding is not None
        part = np.zeros(whole.sharding.shard_shape(whole.shape), whole.dtype)
        return jax.make_array_from_callback(whole.shape, whole.sharding, lambda _: part)
