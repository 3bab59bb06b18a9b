"""A model's config, and nothing else of it."""

from importlib import resources

from converters.blank import BlankCheckpoint, locate_configs
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.errors import CheckpointError
from converters.on_disk import find_on_disk
from jaxllm.config import ModelConfig

CONFIGS = "jaxllm.plan.configs"
"""Configs of well known models, named by their repo ids with "--" for "/": gated repos and machines without a
network need not be asked for them."""


def list_configs() -> list[str]:
    """Repo ids whose configs come with this package."""
    files = resources.files(CONFIGS).iterdir()
    return sorted(
        file.name.removesuffix(".json").replace("--", "/") for file in files if file.name.endswith(".json")
    )


def open_configs(config: ModelConfig) -> Checkpoint:
    """The configs of a folder, a config.json, a GGUF file, a repo id of `list_configs`, or another repo's.

    With a revision the repo is asked in any case. The caller closes it.

    Raises:
        CheckpointError: the model cannot be found, read or reached.
    """
    known = resources.files(CONFIGS) / f"{config.model.replace('/', '--')}.json"
    if find_on_disk(config.model) is None and config.revision is None and known.is_file():
        with resources.as_file(known) as path:
            return BlankCheckpoint(path)
    try:
        path = locate_configs(
            config.model, revision=config.revision, cache_dir=config.cache_dir, token=config.token
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; give the path of a config.json, or one of {', '.join(list_configs())}"
        ) from error
    blank = path.is_dir() or path.suffix == ".json"
    return BlankCheckpoint(path) if blank else open_checkpoint(str(path))
