"""A cluster of two nodes on this machine, each with two CPUs, for all tests."""

import os
import sys
from collections.abc import Iterator
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
