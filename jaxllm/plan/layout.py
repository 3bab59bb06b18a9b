"""How the chips of a target are shared out: replicas of the model, or data groups, each cut over some."""

from dataclasses import dataclass
from typing import Self

from jax.sharding import Mesh

from jaxllm.parallel import make_mesh, stage_meshes
from pallas_kernels.targets import Target
from pallas_kernels.targets.target import CHIPS_PER_GPU_HOST

CHIPS_OF_ONE_HOST, CHIPS_PER_TPU_HOST = {"v5e": 8, "v6e": 8, "v5p": 4}, 4
"""TPUs of the largest slice on one host, and on each host of larger slices
(https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, /v5e, /v6e)."""


@dataclass(frozen=True)
class Layout:
    """Chips as the model is laid out on them.

    Attributes:
        target: all chips.
        tensor_parallel_size, expert_parallel_size, pipeline_parallel_size: a replica, or data group, has as
            many chips as their product, see `jaxllm.parallel.make_mesh`.
        data_parallel_size: replicas, which share requests and run the same programs; or data groups.
        replica: the slice that a replica is on, its stages' chips side by side.
        data_parallel_experts: it is data groups; together they are one replica, on all chips.
    """

    target: Target
    tensor_parallel_size: int
    expert_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    replica: Target
    data_parallel_experts: bool = False

    @classmethod
    def make(
        cls,
        target: Target,
        tensor: int,
        expert: int = 1,
        data: int | None = None,
        *,
        pipeline: int = 1,
        data_parallel_experts: bool = False,
    ) -> Self:
        """A layout that uses all chips.

        Args:
            tensor, expert, data, pipeline: the sizes; without `data` as many replicas, or data groups, as
                there are chips for.
            data_parallel_experts: data groups rather than replicas.

        Raises:
            ValueError: the sizes and the chips do not go together; the message names the one to change.
        """
        chips, size = target.num_chips, tensor * expert * pipeline
        sizes = f"tensor_parallel_size={tensor}"
        if expert > 1:
            sizes += f" * expert_parallel_size={expert}"
        if pipeline > 1:
            sizes += f" * pipeline_parallel_size={pipeline}"
        if chips % size:
            known = ", ".join(map(str, divisors(chips)))
            raise ValueError(f"{sizes}: must divide the {chips} chips of {target}, as {known} do")
        if data is None:
            data = chips // size
        if size * data != chips:
            raise ValueError(
                f"data_parallel_size={data}: with {sizes} it makes {size * data} chips, and {target} has "
                f"{chips}; data_parallel_size={chips // size} uses all of them"
            )
        if target.chip.platform == "gpu" and size > CHIPS_PER_GPU_HOST:
            raise ValueError(
                f"{sizes}: a replica on {target.chip.name} stays within a host's {CHIPS_PER_GPU_HOST} chips, "
                "because nothing is known of the network between hosts"
            )
        if pipeline > 1 and size > (host := chips_per_host(target)):
            raise ValueError(
                f"{sizes}: stages are planned for the chips of one host, and a host of {target} has "
                f"{host} chips; leave out pipeline_parallel_size, or ask for at most {host} chips a replica"
            )
        if data_parallel_experts:
            _check_groups(target, data, pipeline)
        replica = target if data_parallel_experts else find_slice(target, size)
        return cls(target, tensor, expert, pipeline, data, replica, data_parallel_experts)

    @property
    def num_groups(self) -> int:
        """Data groups of a replica; one is none."""
        return self.data_parallel_size if self.data_parallel_experts else 1

    @property
    def num_replicas(self) -> int:
        """Engines behind one queue."""
        return 1 if self.data_parallel_experts else self.data_parallel_size

    @property
    def group_chips(self) -> int:
        """Chips of a stage of a data group; all of a stage's where there is one group."""
        return self.tensor_parallel_size * self.expert_parallel_size

    @property
    def stage_chips(self) -> int:
        """Chips of each stage of a replica; all of them where it has one stage."""
        return self.group_chips * self.num_groups

    @property
    def replica_chips(self) -> int:
        """Chips of a replica."""
        return self.stage_chips * self.pipeline_parallel_size

    @property
    def num_chips(self) -> int:
        """All of them."""
        return self.replica_chips * self.num_replicas

    def meshes(self) -> list[Mesh]:
        """Each stage's mesh, of chips that need not be there, cut as the engine cuts a replica's.

        Raises:
            RuntimeError: the compiler for these chips is not installed.
        """
        mesh = make_mesh(
            self.tensor_parallel_size,
            self.replica.devices(),
            expert_parallel_size=self.expert_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            data_parallel_size=self.num_groups,
        )
        return stage_meshes(mesh)

    def __str__(self) -> str:
        sizes = ("tensor", "expert", "pipeline", "data")
        named = (f"{name}_parallel_size={getattr(self, f'{name}_parallel_size')}" for name in sizes)
        left_out = ("expert_parallel_size=1", "pipeline_parallel_size=1")
        groups = ["data_parallel_experts"] if self.data_parallel_experts else []
        return ", ".join([str(self.target), *(size for size in named if size not in left_out), *groups])


def _check_groups(target: Target, groups: int, stages: int) -> None:
    """Refuses data groups that the engine refuses."""
    if groups == 1:
        raise ValueError(
            f"data_parallel_experts=True: all {target.num_chips} chips of {target} make one data group; "
            "leave it out, or lower tensor_parallel_size or expert_parallel_size"
        )
    if stages > 1:
        raise ValueError(
            f"pipeline_parallel_size={stages}: must be 1 with data_parallel_experts; use tensor_parallel_size"
        )
    if target.num_chips > (host := chips_per_host(target)):
        raise ValueError(
            f"data_parallel_size={groups}: the engine has all data groups in one process, and a host of "
            f"{target} has {host} chips; leave out data_parallel_experts, or take at most {host} chips"
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
            f"{chips} chips a replica: {target} cannot be cut into slices of so many; it can into "
            f"{', '.join(map(str, inside))}"
        )
    return (exact or larger)[0]


def chips_per_host(target: Target) -> int:
    """How many of a target's chips a host has at most."""
    if target.chip.platform == "gpu":
        return CHIPS_PER_GPU_HOST
    one_host = CHIPS_OF_ONE_HOST[target.chip.name]
    return one_host if target.num_chips <= one_host else CHIPS_PER_TPU_HOST


def divisors(number: int) -> list[int]:
    """All whole numbers that divide it."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _tiles(shape: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return all(size % piece == 0 for size, piece in zip(sorted(shape), sorted(part), strict=True))
