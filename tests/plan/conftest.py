"""A small model to plan, and this machine's CPUs in the place of chips."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from plan_cases import CONFIG, step

from jaxllm.cli import plan as command
from jaxllm.plan.step import Step
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.lowering import Lowering
from pallas_kernels.targets import Target


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets does not outlive the test."""
    for name in (*command.ENVIRONMENT, *command.QUIET):
        monkeypatch.setenv(name, os.environ.get(name, ""))


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chips are CPUs, but the process does not live in their memory."""
    monkeypatch.setattr("jaxllm.runner.memory.PROCESS_BYTES", 0)
    monkeypatch.setattr(Target, "devices", lambda self: jax.devices()[: self.num_chips])


@pytest.fixture
def steps(cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled."""

    def made(lowering: Lowering, bucket: Bucket, num_pages: int) -> Step:
        layers = lowering.model.num_layers
        return step(bucket.tokens, flops=1e12 * layers * bucket.tokens, nbytes=1e9, layers=layers)

    monkeypatch.setattr("jaxllm.plan.programs.compile_step", made)


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    def make(**fields: Any) -> str:
        path = tmp_path / "small.json"
        path.write_text(json.dumps(CONFIG | fields))
        return str(path)

    return make
