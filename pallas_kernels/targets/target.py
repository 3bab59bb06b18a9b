"""A number of chips to compile for, none of which need be there."""

import math
from dataclasses import dataclass
from importlib import resources
from typing import Any, Self

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from pallas_kernels.targets.chips import CHIPS, Chip

CHIPS_PER_GPU_HOST = 8


@dataclass(frozen=True)
class Target:
    """A slice of TPUs, or GPUs of one or more hosts: "v5e:2x2", "v5p:2x2x1", "h100", "h100:8".

    Attributes:
        chip: what it is made of.
        shape: chips along each axis of the slice; of GPUs, how many.
    """

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Self:
        """Reads a name; a chip alone is its smallest slice.

        Raises:
            ValueError: no such chip, or no such slice of it; the message lists those there are.
        """
        chip_name, _, shape = name.lower().partition(":")
        chip = CHIPS.get(chip_name)
        if chip is None:
            raise ValueError(f"target {name!r}: there is no chip {chip_name!r}; there are {', '.join(CHIPS)}")
        shape = shape or chip.slices[0]
        if shape not in chip.slices:
            known = ", ".join(f"{chip.name}:{known}" for known in chip.slices)
            raise ValueError(f"target {name!r}: {chip.name} comes as {known}")
        return cls(chip, tuple(map(int, shape.split("x"))))

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return self.chip.name if self.chip.platform == "gpu" and shape == "1" else f"{self.chip.name}:{shape}"

    @property
    def num_chips(self) -> int:
        """All chips of the slice."""
        return math.prod(self.shape)

    def devices(self) -> list[Any]:
        """The chips as jax devices, which programs can be compiled for and nothing can be put on.

        Looks for no hardware. A process that has none should set JAX_PLATFORMS=cpu and TPU_SKIP_MDS_QUERY=1
        before it imports jax: libtpu otherwise asks the network which machine it is on.

        Raises:
            RuntimeError: the compiler for these chips is not installed.
        """
        try:
            if self.chip.platform == "tpu":
                return self._tpu_devices()
            return self._gpu_devices()
        except (ImportError, RuntimeError) as error:
            raise RuntimeError(
                f"cannot compile for {self}: {error}; for the compilers in the clone of jaxllm run "
                "pip install -e '.[plan]'"
            ) from error

    def mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
        """A mesh of the first of these chips, laid out as the connections between them ask for.

        Its axes are Auto: the compiler finds the shardings that are not given.

        Raises:
            ValueError: there are fewer chips than the shape needs.
        """
        count = math.prod(shape)
        if count > self.num_chips:
            raise ValueError(f"shape={shape}: needs {count} chips, {self} has {self.num_chips}")
        axis_types = (AxisType.Auto,) * len(names)
        return jax.make_mesh(shape, names, axis_types, devices=self.devices()[:count])

    def _tpu_devices(self) -> list[Any]:
        options: dict[str, Any] = {}
        if self.num_chips == 1:  # else the compiler takes a whole host of four at least
            options["chips_per_host_bounds"] = (1, 1, 1)
        return topologies.get_topology_desc(str(self), platform="tpu", **options).devices

    def _gpu_devices(self) -> list[Any]:
        hosts = -(-self.num_chips // CHIPS_PER_GPU_HOST)
        text = resources.files("pallas_kernels.targets").joinpath(f"{self.chip.name}.txtpb").read_text()
        return topologies.get_topology_desc(
            "", platform="cuda", target_config=text, topology=f"1x{hosts}x{self.num_chips // hosts}"
        ).devices
