"""A model's config, and nothing else of it."""

from importlib import resources
from pathlib import Path

from converters.blank import BlankCheckpoint, locate_configs
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.errors import CheckpointError
from jaxllm.config import ModelConfig
from jaxllm.wording import did_you_mean

CONFIGS = "jaxllm.plan.configs"
"""Configs of well known models, named by their repo ids with "--" for "/", and of the demo model: gated repos
need not be asked for them, and neither a network nor the package of weights need be there."""


def list_configs() -> list[str]:
    """Models whose configs come with this package."""
    files = resources.files(CONFIGS).iterdir()
    return sorted(
        file.name.removesuffix(".json").replace("--", "/") for file in files if file.name.endswith(".json")
    )


def open_configs(config: ModelConfig) -> Checkpoint:
    """The configs of a folder, a config.json, a GGUF file, a name of `list_configs`, or another repo's.

    With a revision the repo is asked in any case. The caller closes it.

    Raises:
        CheckpointError: the model cannot be found, read or reached.
    """
    known = resources.files(CONFIGS) / f"{config.model.replace('/', '--')}.json"
    if not Path(config.model).expanduser().exists() and config.revision is None and known.is_file():
        with resources.as_file(known) as path:
            return BlankCheckpoint(path)
    try:
        path = locate_configs(
            config.model, revision=config.revision, cache_dir=config.cache_dir, token=config.token
        )
    except CheckpointError as error:
        names = list_configs()
        choices = f"give the path of a config.json, or one of {', '.join(names)}"
        raise CheckpointError(f"{error}; {choices}{did_you_mean(config.model, names)}") from error
    blank = path.is_dir() or path.suffix == ".json"
    return BlankCheckpoint(path) if blank else open_checkpoint(str(path))
