"""The devices that an engine runs on, and this host's part of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from converters.checkpoint import Checkpoint, ShardedCheckpoint
from jaxllm.config import EngineConfig, ParallelConfig
from jaxllm.parallel import adopt_mesh, make_mesh, stage_meshes
from jaxllm.parallel.hosts import HostGroup
from jaxllm.parallel.stage_hosts import StageHosts, spread_mesh
from jaxllm.runner.hosts import check_hosts


@dataclass(frozen=True)
class Devices:
    """A mesh, cut into stages.

    Attributes:
        mesh: of all stages.
        stages: the mesh of each, on all hosts.
        where: which hosts have which stages.
        own: the stages of this host.
    """

    mesh: Mesh
    stages: Sequence[Mesh]
    where: StageHosts
    own: slice

    @property
    def num_stages(self) -> int:
        """On all hosts."""
        return len(self.stages)

    @property
    def own_meshes(self) -> Sequence[Mesh]:
        """Of the stages of this host."""
        return self.stages[self.own]

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raises NotImplementedError if a host cannot read its stages alone from such a checkpoint."""
        if self.where.are_several and isinstance(checkpoint, ShardedCheckpoint):
            raise NotImplementedError(
                f"model={str(checkpoint.path)!r}: Orbax reads alike on all hosts, whose stages differ; "
                "use the safetensors that it was made from, or tensor_parallel_size"
            )


def choose_devices(config: EngineConfig, mesh: Mesh | None, hosts: HostGroup | None) -> Devices:
    """The devices of the config, or of somebody's own mesh, which is to agree with it.

    Args:
        hosts: that the mesh spans, where they are several.

    Raises:
        NotImplementedError: something is asked for that stages, or stages on several hosts, cannot do.
        ValueError: there are too few devices, the mesh is another one, or hosts have no part in it.
    """
    mesh = _choose_mesh(config.parallel, mesh, spread=hosts is not None)
    stages = stage_meshes(mesh)
    where = StageHosts.of(stages)
    if hosts is not None:
        check_hosts(mesh)
    elif where.are_several:
        raise ValueError(
            f"pipeline_parallel_size={len(stages)}: stages would be in several processes; set num_hosts"
        )
    if where.are_several and config.compile.expert_metrics:
        raise NotImplementedError(
            "expert_metrics=True: with stages on several hosts nobody counts tokens of experts; leave it out"
        )
    return Devices(mesh, stages, where, slice(0, len(stages)) if hosts is None else where.own(hosts.rank))


def _choose_mesh(parallel: ParallelConfig, mesh: Mesh | None, *, spread: bool) -> Mesh:
    """The mesh of the config, or somebody's own, which is to agree with it.

    Args:
        spread: lay stages over all hosts.
    """
    sizes = {
        "stage": ("pipeline_parallel_size", parallel.pipeline_parallel_size),
        "expert": ("expert_parallel_size", parallel.expert_parallel_size),
        "tensor": ("tensor_parallel_size", parallel.tensor_parallel_size),
    }
    groups = parallel.data_parallel_size if parallel.data_parallel_experts else 1
    if mesh is None and spread and parallel.pipeline_parallel_size > 1:
        mesh = spread_mesh(
            pipeline=parallel.pipeline_parallel_size,
            expert=parallel.expert_parallel_size,
            tensor=parallel.tensor_parallel_size,
        )
    elif mesh is None:
        mesh = make_mesh(
            parallel.tensor_parallel_size,
            expert_parallel_size=parallel.expert_parallel_size,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
            data_parallel_size=groups,
        )
    else:
        mesh = adopt_mesh(mesh, groups)
        for axis, (name, size) in sizes.items():
            if size not in (1, mesh.shape[axis]):
                raise ValueError(
                    f"{name}={size}: the mesh has {mesh.shape[axis]} in its axis {axis!r}; leave it out"
                )
    if mesh.shape["stage"] > 1 and groups > 1:
        raise NotImplementedError(
            f"data_parallel_experts=True: the mesh has {mesh.shape['stage']} stages; give it one"
        )
    return mesh
