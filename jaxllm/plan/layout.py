"""How the chips of a target are shared out: replicas of the model, each cut over some of the chips."""

import math
from dataclasses import dataclass
from typing import Self

from jax.sharding import Mesh

from jaxllm.parallel import make_mesh
from pallas_kernels.targets import Target
from pallas_kernels.targets.target import CHIPS_PER_GPU_HOST


@dataclass(frozen=True)
class Layout:
    """Chips as the model is laid out on them.

    Attributes:
        target: all chips.
        tensor_parallel_size: chips of a replica, which share each layer.
        data_parallel_size: replicas, which share requests and run the same programs.
        replica: the slice that a replica's programs are compiled for.
    """

    target: Target
    tensor_parallel_size: int
    data_parallel_size: int
    replica: Target

    @classmethod
    def make(cls, target: Target, tensor_parallel_size: int, data_parallel_size: int | None = None) -> Self:
        """A layout that uses all chips.

        Args:
            data_parallel_size: None: as many replicas as there are chips for.

        Raises:
            ValueError: the sizes and the chips do not go together; the message names the one to change.
        """
        chips, tensor = target.num_chips, tensor_parallel_size
        if chips % tensor:
            raise ValueError(
                f"tensor_parallel_size={tensor}: must divide the {chips} chips of {target}, as "
                f"{', '.join(map(str, divisors(chips)))} do"
            )
        data = chips // tensor if data_parallel_size is None else data_parallel_size
        if tensor * data != chips:
            raise ValueError(
                f"data_parallel_size={data}: with tensor_parallel_size={tensor} it makes {tensor * data} "
                f"chips, and {target} has {chips}; data_parallel_size={chips // tensor} uses all of them"
            )
        if target.chip.platform == "gpu" and tensor > CHIPS_PER_GPU_HOST:
            raise ValueError(
                f"tensor_parallel_size={tensor}: a replica on {target.chip.name} stays within a host's "
                f"{CHIPS_PER_GPU_HOST} chips, because nothing is known of the network between hosts"
            )
        return cls(target, tensor, data, find_slice(target, tensor))

    @property
    def num_chips(self) -> int:
        """All of them."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def torus(self) -> tuple[int, ...]:
        """Chips of a replica along each of its axes that have more than one."""
        if self.tensor_parallel_size < self.replica.num_chips:
            return (self.tensor_parallel_size,)
        return tuple(size for size in self.replica.shape if size > 1)

    def mesh(self) -> Mesh:
        """A replica's mesh, of chips that need not be there.

        Raises:
            RuntimeError: the compiler for these chips is not installed.
        """
        return make_mesh(self.tensor_parallel_size, self.replica.devices())

    def __str__(self) -> str:
        return (
            f"{self.target}, tensor_parallel_size={self.tensor_parallel_size}, "
            f"data_parallel_size={self.data_parallel_size}"
        )


def find_slice(target: Target, chips: int) -> Target:
    """The slice that some chips of a target make, or the smallest one that they are a part of.

    Raises:
        ValueError: the target cannot be cut into such slices.
    """
    if chips == target.num_chips:
        return target
    known = [Target.parse(f"{target.chip.name}:{name}") for name in target.chip.slices]
    inside = [one for one in known if _tiles(target.shape, one.shape)]
    exact = [one for one in inside if one.num_chips == chips]
    # the most compact: its chips are nearest to each other
    exact.sort(key=lambda one: max(one.shape))
    larger = [one for one in inside if one.num_chips > chips]
    if not exact and not larger:
        raise ValueError(
            f"tensor_parallel_size={chips}: {target} cannot be cut into slices of so many chips; it can into "
            f"{', '.join(map(str, inside))}"
        )
    return (exact or larger)[0]


def divisors(number: int) -> list[int]:
    """All whole numbers that divide it."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _tiles(shape: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return math.prod(part) <= math.prod(shape) and all(
        size % piece == 0 for size, piece in zip(sorted(shape), sorted(part), strict=True)
    )
