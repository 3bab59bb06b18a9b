"""Programs of a plan that are kept in a folder."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.models.llama import Llama
from jaxllm.plan.saving import save_programs


def test_programs_that_were_not_written_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others in the folder do not stand in for them."""
    mesh = SimpleNamespace(devices=np.array(jax.devices()[:1]))
    stage: Any = SimpleNamespace(mesh=mesh, programs=lambda pages: {"one": lambda: None})
    monkeypatch.setattr("jaxllm.engine.loading.identify", lambda *_: "these")
    monkeypatch.setattr("jaxllm.runner.kept.compile_watched", lambda lowered: (object(), True))
    folder = tmp_path / "whole"
    folder.mkdir(mode=0o700)
    (folder / "of-another-plan.program").touch()
    with pytest.raises(OSError, match="only 0 of 1 programs could be written"):
        save_programs(tmp_path, Llama, [stage], 3, progress=False)
