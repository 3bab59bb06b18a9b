"""A cluster of two nodes on this machine, each with two CPUs, for all tests, and what is served on it."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for folder in ("engine", "hosts"):  # small checkpoints, and hosts as processes
    sys.path.append(str(Path(__file__).parent.parent / folder))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that has text and chats."""
    from small_text import text_checkpoint

    return text_checkpoint(tmp_path_factory.mktemp("ray") / "model")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """The cluster; this process and those that it starts find it."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    found.add_node(num_cpus=2)
    os.environ["RAY_ADDRESS"] = found.address
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def serve_app(cluster: Any, model: Path) -> Iterator[Callable[..., str]]:
    """Serves the model as an application with further arguments, until the module's end; gives its URL."""
    import ray
    from host_processes import ENGINE, free_port
    from ray import serve

    from jaxllm.server.ray_serve import build_app

    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.getcwd()}
    ray.shutdown()
    ray.init(address=cluster.address, runtime_env={"env_vars": variables}, log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def run(**arguments: Any) -> str:
        options = {key: value for key, value in ENGINE.items() if key != "progress"}
        serve.run(build_app({"model": str(model), "served_model_name": ["tiny"]} | options | arguments))
        return f"http://127.0.0.1:{port}"

    yield run
    serve.shutdown()
