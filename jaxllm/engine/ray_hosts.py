"""Hosts that Ray finds: an actor on each of the others follows this one."""

import dataclasses
import importlib
import logging
import os
import socket
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.wording import how_to_install

logger = logging.getLogger(__name__)

PLACE_SECONDS = 60.0
"""How long Ray has to find room; a cluster may have to start nodes first."""
NODE_SHARE = 0.001
"""Of a node's own resource, which each has one of: so a bundle is bound to the node."""
ENVIRONMENT = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_", "NCCL_", "HF_")
"""Beginnings of variables that the other hosts get from this one."""


class Follower:
    """What runs on each of the other hosts, in a process that Ray starts."""

    def follow(self, config: EngineConfig) -> None:
        """Follows host 0 to the end; errors are those of `follow_host`."""
        from jaxllm.engine.hosting import follow_host

        follow_host(config)


class RayHosts:
    """The other hosts of an engine, each on a node of its own.

    Args:
        config: of the engine; with the number of hosts.

    Raises:
        RuntimeError: Ray is not installed, no cluster is there, or it has too few nodes that are free.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._ray = _import("ray")
        try:
            self._ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False)
        except ConnectionError as error:
            raise RuntimeError(
                "distributed_executor_backend='ray': there is no cluster; start one with `ray start --head`, "
                "and `ray start --address=...` on the other hosts"
            ) from error
        address = self._ray.util.get_node_ip_address()
        with socket.create_server((address, 0)) as found:
            port = found.getsockname()[1]
        parallel = dataclasses.replace(config.parallel, coordinator_address=f"{address}:{port}", host_rank=0)
        self.config = dataclasses.replace(config, parallel=parallel)
        """With the address where the hosts meet."""
        self._group = self._place(parallel.num_hosts, dict(parallel.ray_resources or {}))
        self._actors, self._ends = [], []
        for rank in range(1, parallel.num_hosts):
            actor = self._actor(rank)
            own = dataclasses.replace(self.config, parallel=dataclasses.replace(parallel, host_rank=rank))
            self._actors.append(actor)
            self._ends.append(actor.follow.remote(own))

    def failed(self) -> str | None:
        """Why one of the other hosts has ended, if one has."""
        done, _ = self._ray.wait(self._ends, num_returns=1, timeout=0)
        for end in done:
            try:
                self._ray.get(end)
            except Exception as error:
                return f"a host that Ray has started has failed: {error}"
            return "a host that Ray has started has ended"
        return None

    def close(self) -> None:
        """Ends the other hosts' processes, and gives their nodes back."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.util.remove_placement_group(self._group)

    def _place(self, num_hosts: int, resources: dict[str, float]) -> Any:
        here = f"node:{self._ray.util.get_node_ip_address()}"
        bundles = [{here: NODE_SHARE}] + [resources or {"CPU": 1}] * (num_hosts - 1)
        group = self._ray.util.placement_group(bundles, strategy="STRICT_SPREAD")
        if not group.wait(timeout_seconds=PLACE_SECONDS):
            self._ray.util.remove_placement_group(group)
            raise RuntimeError(
                f"num_hosts={num_hosts}: Ray has not {num_hosts} nodes, this one included, with "
                f"{resources or {'CPU': 1}} free on each of the others"
            )
        return group

    def _actor(self, rank: int) -> Any:
        strategy = _import("ray.util.scheduling_strategies").PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=rank
        )
        bundle = dict(self._group.bundle_specs[rank])
        variables = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)}
        options: dict[str, Any] = {
            "num_cpus": bundle.pop("CPU", 0),
            "num_gpus": bundle.pop("GPU", 0),
            "resources": bundle,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": variables},
        }
        return self._ray.remote(Follower).options(**options).remote()


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error}; for Ray {how_to_install('ray')}") from error
