"""An engine's parts for any number of replicas."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from jax.sharding import Mesh

from jaxllm.config import EngineConfig
from jaxllm.engine.hosting import follows, load_on_hosts, meet_hosts
from jaxllm.engine.laps import Laps
from jaxllm.engine.loading import EngineParts, load_parts
from jaxllm.engine.ray_hosts import RayHosts
from jaxllm.engine.replica_core import ReplicaCore
from jaxllm.engine.replicas import Replicas
from jaxllm.parallel import replica_meshes


def load_engine(config: EngineConfig, mesh: Mesh | None = None, laps: Laps | None = None) -> EngineParts:
    """Builds an engine's parts; arguments and errors are those of `load_parts`.

    With several replicas the first is loaded as one alone would be. The others get their weights from it, and
    compile for their own devices beside each other.

    Args:
        mesh: with several replicas, its axis `data` has one slice for each.

    Raises:
        ValueError: besides `load_parts`' reasons, there are too few devices for all replicas.
    """
    count = config.parallel.data_parallel_size
    if config.parallel.num_hosts != 1:
        if follows(config):
            rank = config.parallel.host_rank
            raise ValueError(f"host_rank={rank}: an engine is made on host 0; the others call follow_host")
        return _load_with_others(config, mesh, laps)
    if count == 1 or config.parallel.data_parallel_experts:
        return load_parts(config, mesh, laps)
    laps = Laps() if laps is None else laps
    meshes = replica_meshes(config.parallel, mesh)
    with ExitStack() as failed:
        parts = [load_parts(config, meshes[0], laps)]
        failed.callback(_close, parts)
        quiet = dataclasses.replace(config, compile=dataclasses.replace(config.compile, progress=False))
        weights = parts[0].cores[0].runner.params
        with ThreadPoolExecutor(count - 1, thread_name_prefix="load-replica") as threads:
            loading = [threads.submit(load_parts, quiet, own, None, weights) for own in meshes[1:]]
        for found in loading:
            if found.exception() is None:
                parts.append(found.result())
        for found in loading:
            found.result()  # raises what went wrong, if anything has
        failed.pop_all()
    laps.end("replicas")
    return _joined(config, parts, laps)


def _load_with_others(config: EngineConfig, mesh: Mesh | None, laps: Laps | None) -> EngineParts:
    if config.parallel.distributed_executor_backend != "ray":
        return load_on_hosts(config, meet_hosts(config), mesh, laps)
    others = RayHosts(config)
    try:
        hosts = meet_hosts(others.config, others.failed)
    except Exception:
        others.close()
        raise
    hosts.when_ended(others.close)
    return load_on_hosts(others.config, hosts, mesh, laps)


def _joined(config: EngineConfig, parts: list[EngineParts], laps: Laps) -> EngineParts:
    seed = config.model.seed
    cores = tuple(ReplicaCore.of(part.cores[0], seed=seed) for part in parts)
    for part in parts[1:]:
        part.inputs.close()  # requests are made ready by the first one's
    return dataclasses.replace(
        parts[0],
        core=Replicas(cores, seed),
        cores=cores,
        weight_sources=tuple(source for part in parts for source in part.weight_sources),
        load_seconds=laps.seconds,
    )


def _close(parts: list[EngineParts]) -> None:
    for part in parts:
        part.inputs.close()
        for core in part.cores:
            core.runner.close()
