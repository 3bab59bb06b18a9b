"""Stages that lie on several hosts: each on whole hosts, or each host with whole stages."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.parallel.mesh import AXES, auto_mesh


@dataclass(frozen=True)
class StageHosts:
    """Which hosts have which stages.

    Attributes:
        hosts: of each stage, by rank, in order.
    """

    hosts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, meshes: Sequence[Mesh]) -> Self:
        """Those of the stages' meshes.

        Raises:
            ValueError: stages are cut over hosts in another way, or are not in the order of these.
        """
        found = cls(tuple(tuple(sorted({d.process_index for d in mesh.devices.flat})) for mesh in meshes))
        for before, after in itertools.pairwise(found.hosts):
            if before[-1] < after[0] or (before == after and len(before) == 1):
                continue
            raise ValueError(
                f"pipeline_parallel_size={len(meshes)}: stages would be on hosts {list(found.hosts)}; each "
                "must have whole hosts, or a host whole stages, in the order of the hosts: leave mesh out, "
                "or lay its axis 'stage' over them so"
            )
        return found

    @property
    def are_several(self) -> bool:
        """Whether some host has no part of some stage."""
        return self.hosts[0] != self.hosts[-1]

    @property
    def reporter(self) -> int:
        """The host that reads what the last stage has sampled."""
        return self.hosts[-1][0]

    def own(self, rank: int) -> slice:
        """The stages of a host, which follow one another."""
        stages = [index for index, hosts in enumerate(self.hosts) if rank in hosts]
        return slice(stages[0], stages[-1] + 1)


def spread_mesh(*, pipeline: int, expert: int, tensor: int) -> Mesh:
    """A mesh with as many devices of every host, in the order of the hosts.

    Args:
        pipeline, expert, tensor: sizes of its axes.

    Raises:
        ValueError: the hosts have too few devices, or cannot have as many each.
    """
    hosts: dict[int, list[Any]] = {}
    for device in jax.devices():
        hosts.setdefault(device.process_index, []).append(device)
    count = pipeline * expert * tensor
    asked = f"pipeline_parallel_size * expert_parallel_size * tensor_parallel_size={count}"
    each, rest = divmod(count, len(hosts))
    if rest or (pipeline % len(hosts) and len(hosts) % pipeline):
        raise ValueError(
            f"{asked}: {len(hosts)} hosts must have as many devices each, and whole stages, or stages whole "
            f"hosts; choose a pipeline_parallel_size that is a multiple of {len(hosts)} or divides it"
        )
    fewest = min(map(len, hosts.values()))
    if each > fewest:
        raise ValueError(f"{asked}: {each} devices on each host, and some have only {fewest}; ask for fewer")
    devices = [device for rank in sorted(hosts) for device in hosts[rank][:each]]
    return auto_mesh(np.array(devices).reshape(pipeline, 1, expert, tensor))


def joined_mesh(before: Mesh, after: Mesh) -> Mesh:
    """The devices of two neighbouring stages, along the axis `stage`."""
    return auto_mesh(np.concatenate([before.devices, after.devices], axis=AXES.index("stage")))
