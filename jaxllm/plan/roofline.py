"""How fast chips can be at best: what has to be done, over the rates that their vendors state.

The roofline model (https://doi.org/10.1145/1498765.1498785): a part of a step takes as long as its products
at the chip's peak or its bytes at the memory's bandwidth, whichever is longer. Collectives are added to that:
the products of a layer wait for those of the one before. They take what a ring or torus needs, and a latency
for each hop, as in https://jax-ml.github.io/scaling-book/sharding/. Rates are those of
`pallas_kernels.targets.chips`, which says where they are from. Real steps are slower: nothing reaches its
peak, and hosts and kernels take time to start.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pallas_kernels.targets import Chip, Target
from pallas_kernels.targets.compiled import Traffic

TPU_HOP_SECONDS = 1e-6
"""From a TPU to its neighbour (https://jax-ml.github.io/scaling-book/sharding/)."""
GPU_BASE_SECONDS, GPU_HOP_SECONDS = 3.6e-6, 0.47e-6
"""NCCL's own figures for a ring over NVLink with its protocol for small messages
(`baseLat` and `hwLat` in https://github.com/NVIDIA/nccl/blob/v2.8.4-1/src/include/tuning.h)."""
WHOLE_AXIS, CUBE = 16, 4
"""Which slices have their ends connected: axes of 16 chips in a plane, all axes of slices made of cubes of 4
(https://jax-ml.github.io/scaling-book/tpus/)."""


@dataclass(frozen=True)
class Work:
    """Something that a chip has to do: operations of products, and bytes to and from its memory."""

    flops: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)

    def seconds(self, chip: Chip) -> float:
        """At the chip's bfloat16 peak, or its memory's bandwidth."""
        return max(self.flops / chip.bf16, self.nbytes / chip.bandwidth)


@dataclass(frozen=True)
class Links:
    """What connects the chips of a stage, which is all of a replica where it has one stage and data group.

    Attributes:
        size: chips that speak with each other; between data groups each with one of every group.
        expert_size: chips among which whole experts are spread.
        bandwidth: bytes a second that each can send to others, over all links together.
        hops: from a chip to the farthest one.
        hop_seconds: latency of each.
        base_seconds: that any collective takes besides.
    """

    size: int
    expert_size: int
    bandwidth: float
    hops: int
    hop_seconds: float
    base_seconds: float = 0.0

    @classmethod
    def of(cls, target: Target, torus: tuple[int, ...], size: int, expert_size: int = 1) -> "Links":
        """Those of `size` chips.

        Args:
            torus: how many along each axis of a TPU slice; between data groups those of all groups.
        """
        chip = target.chip
        if chip.platform == "gpu":  # NVSwitch connects each with each
            hops = max(0, size - 1)
            return cls(size, expert_size, chip.interconnect / 2, hops, GPU_HOP_SECONDS, GPU_BASE_SECONDS)
        one_way = _link_bandwidth(target)
        wraps = _wraps(torus)
        axes = zip(torus, wraps, strict=True)
        hops = sum(length // 2 if wrapped else length - 1 for length, wrapped in axes)
        bandwidth = sum(one_way * (2 if wrapped else 1) for wrapped in wraps)
        return cls(size, expert_size, bandwidth, hops, TPU_HOP_SECONDS)

    def seconds(self, collectives: Mapping[str, Traffic]) -> float:
        """What collectives take, one after the other.

        Raises:
            ValueError: one of a kind that is not known.
        """
        return sum(self._seconds(kind, traffic) for kind, traffic in collectives.items())

    def _seconds(self, kind: str, traffic: Traffic) -> float:
        others = (self.size - 1) / self.size
        match kind:
            case "all-reduce":  # a reduce-scatter and an all-gather
                sent, rounds = 2 * others * traffic.nbytes, 2
            case "all-gather" | "all-to-all":
                sent, rounds = others * traffic.nbytes, 1
            case "ragged-all-to-all":  # there and back; there is room for all rows, and one in so many comes
                sent, rounds = 2 / (self.expert_size + 1) * traffic.nbytes, 1
            case "reduce-scatter":  # its result is one of the parts
                sent, rounds = (self.size - 1) * traffic.nbytes, 1
            case "collective-permute":
                sent, rounds = traffic.nbytes, 1
            case _:
                raise ValueError(f"{kind}: no such collective is known")
        latency = traffic.count * (self.base_seconds + rounds * self.hops * self.hop_seconds)
        return sent / self.bandwidth + latency if self.bandwidth else 0.0


def transfer_seconds(target: Target, nbytes: float, hops: int) -> float:
    """What it takes each chip of a stage to send so much to its counterpart in the next stage.

    All send at the same time, the same way: each link between two TPUs carries what `hops` chips send.

    Args:
        hops: links of a TPU slice from a chip to its counterpart; an NVSwitch connects each with each.
    """
    if target.chip.platform == "gpu":
        return nbytes / (target.chip.interconnect / 2) + GPU_BASE_SECONDS + GPU_HOP_SECONDS
    return hops * (nbytes / _link_bandwidth(target) + TPU_HOP_SECONDS)


def _link_bandwidth(target: Target) -> float:
    """Bytes a second that a TPU sends to one neighbour; it has two along each axis of its kind of slice."""
    return target.chip.interconnect / 2 / (2 * len(target.shape))


def _wraps(torus: tuple[int, ...]) -> list[bool]:
    """For each axis of a TPU slice, whether its ends are connected."""
    if len(torus) == 3:
        return [all(length % CUBE == 0 for length in torus)] * 3
    return [length >= WHOLE_AXIS for length in torus]
