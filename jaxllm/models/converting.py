"""Any checkpoint to an Orbax one: nothing left to dequantize or transpose, each device reads its own part."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters import orbax
from converters.checkpoint import Checkpoint
from jaxllm.models.abstract import split
from jaxllm.models.loading import load_weights
from jaxllm.models.registry import ModelRegistry
from jaxllm.parallel import make_mesh


def convert(
    checkpoint: Checkpoint,
    destination: str | Path,
    *,
    tokenizer: Any = None,
    dtype: np.dtype[Any] | None = None,
    progress: bool = True,
) -> Path:
    """Writes a checkpoint as an Orbax folder, for any mesh. The whole model passes through the host's memory.

    Args:
        checkpoint: an open one, of any format.
        destination: a folder that does not exist, or is empty.
        tokenizer: saved along with the weights, if given.
        dtype: of the weights that are written (default: the checkpoint's own).
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        CheckpointError: the destination is in use, or the checkpoint does not fit its model.
        ValueError: the architecture is not supported.
    """
    folder = Path(destination).expanduser()
    orbax.refuse_to_overwrite(folder.absolute())
    dtype = checkpoint.dtype if dtype is None else dtype
    model = ModelRegistry.resolve(checkpoint.config)
    config = model.read_config(checkpoint.config, dtype=dtype, tensor_parallel_size=1)
    _, parameters = split(model, config)
    mesh = make_mesh(1, jax.local_devices(backend="cpu"))
    arrays = load_weights(checkpoint, model.rules, parameters, config.geometry, mesh, progress=progress)
    named = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
    orbax.save(
        folder,
        dict(zip(parameters, arrays, strict=True)),
        {**named, "dtype": dtype.name},
        checkpoint.generation_config,
        tokenizer,
    )
    return folder
