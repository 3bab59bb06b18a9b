"""A GGUF file as a checkpoint: transformers' names, shapes and config over llama.cpp's tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType

from converters.checkpoint import TensorInfo
from converters.errors import CheckpointError
from converters.gguf_config import read_config, read_generation_config
from converters.gguf_file import GGUFFile
from converters.gguf_names import ARCHITECTURES, Names, Undo, minus_one, transpose

_FLOATS = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


class _Origin(NamedTuple):
    file: GGUFFile
    stored: str
    undo: Undo | None

    @property
    def info(self) -> TensorInfo:
        tensor = self.file.tensors[self.stored]
        shape = tensor.shape[::-1] if self.undo is transpose else tensor.shape
        return TensorInfo(shape, _FLOATS.get(tensor.kind, np.dtype(np.float32)))


class GGUFCheckpoint:
    """One GGUF file. Opening it reads and checks the header; tensors are dequantized when they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = GGUFFile(path)
        architecture = str(file.metadata.get("general.architecture"))
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: GGUF architecture {architecture!r} is not read; read are {', '.join(ARCHITECTURES)}"
            )
        names = ARCHITECTURES[architecture]
        self._origins = _origins(file, names)
        self.config = read_config(file, architecture)
        self.generation_config = read_generation_config(file)
        self.tensors: Mapping[str, TensorInfo] = {name: origin.info for name, origin in self._origins.items()}
        # The embedding's, or bfloat16 where that is quantized: what was quantized was nearly always that.
        self.dtype = _FLOATS.get(file.tensors["token_embd.weight"].kind, np.dtype(ml_dtypes.bfloat16))

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """A view of the file where the tensor is stored in `dtype` and unchanged, else a new array."""
        file, stored, undo = self._origins[name]
        exact = self.tensors[name].dtype
        dtype = dtype or exact
        if undo is None:
            return file.read(stored, dtype)
        # Subtracted before the cast: a norm of 1.004 minus one is 0.004, but bfloat16 rounds 1.004 to 1.
        tensor = file.read(stored, exact if undo is minus_one else dtype)
        try:
            return undo(tensor, self.config).astype(dtype, copy=False)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: tensor {stored!r} of shape {list(tensor.shape)} does not fit the heads "
                f"({error}); the file is damaged"
            ) from error

    def release(self, name: str) -> None:
        """Gives back the memory that reading a tensor took."""
        file, stored, _ = self._origins[name]
        file.release(stored)

    def close(self) -> None:
        """Forgets the file; it is unmapped when the last view of it is gone."""
        self._origins = {}
        self.tensors = {}


def _origins(file: GGUFFile, names: Names) -> dict[str, _Origin]:
    """By transformers' names. Unknown names stay as they are, to be reported as left over."""
    origins: dict[str, _Origin] = {}
    for stored in file.tensors:
        if stored.rpartition(".")[0] in names.settings:
            continue
        name, undo = names.resolve(stored) or (stored, None)
        if name in origins:
            raise CheckpointError(
                f"{file.path}: tensors {origins[name].stored!r} and {stored!r} are both {name}"
            )
        origins[name] = _Origin(file, stored, undo)
    return origins
