"""A model's configs without its weights, which somebody else makes up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoint import TensorInfo
from converters.dequantized import is_read, without_quantization
from converters.errors import CheckpointError
from converters.on_disk import find_on_disk
from converters.safetensors import published_dtype, read_json

CONFIG_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
"""Configs and tokenizer."""


class BlankCheckpoint:
    """A checkpoint that has no tensors; see `Checkpoint`.

    Attributes:
        quantization: how its weights are quantized, where that is undone as they are read; else None.
    """

    def __init__(self, path: Path) -> None:
        """Reads the configs of a folder, or a file that is one.

        Raises:
            CheckpointError: there is no `config.json`, or it cannot be read.
        """
        self.path = path if path.is_dir() else path.parent
        file = path / "config.json" if path.is_dir() else path
        config: dict[str, Any] = read_json(file)
        about = config["quantization_config"] if is_read(config) else {}
        self.quantization: str | None = about.get("quant_method")
        self.config = without_quantization(config)
        beside = self.path / "generation_config.json"
        self.generation_config: dict[str, Any] = read_json(beside, optional=True)
        self.tensors: Mapping[str, TensorInfo] = {}
        self.dtype = published_dtype(self.config, self.tensors)

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """There is nothing to read.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{self.path}: was opened without weights, so {name} cannot be read")

    def release(self, name: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def locate_configs(
    model: str, *, revision: str | None = None, cache_dir: str | Path | None = None, token: str | None = None
) -> Path:
    """The folder or file with a model's configs; of a repo only these and the tokenizer are downloaded.

    Raises:
        CheckpointError: no such path, repo or revision; no access; or no network and not in the cache.
    """
    if (path := find_on_disk(model)) is not None:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from converters.hub import check_repo_id, locate

    if ":" in model:
        return locate(model, revision=revision, cache_dir=cache_dir, token=token)
    check_repo_id(model)
    try:
        folder = snapshot_download(
            model, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=CONFIG_FILES
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{model}: its config cannot be had ({reason[0]})") from error
    return Path(folder)
