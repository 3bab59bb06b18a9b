"""A GGUF file as a checkpoint: transformers' names, shapes and config over llama.cpp's tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType

from converters.checkpoint import TensorInfo
from converters.errors import CheckpointError
from converters.gguf_config import read_config, read_generation_config
from converters.gguf_file import GGUFFile
from converters.gguf_names import ARCHITECTURES, Names, transpose

_FLOATS = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


class GGUFCheckpoint:
    """One GGUF file. Opening it reads and checks the header; tensors are dequantized when they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        architecture = str(self._file.metadata.get("general.architecture"))
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: GGUF architecture {architecture!r} is not read; read are {', '.join(ARCHITECTURES)}"
            )
        names = ARCHITECTURES[architecture]
        self._origins = _origins(self._file, names)
        self.config = read_config(self._file, architecture)
        self.generation_config = read_generation_config(self._file)
        self.tensors: Mapping[str, TensorInfo] = {
            name: self._info(origin, undo) for name, (origin, undo) in self._origins.items()
        }
        self.dtype = self._published_dtype()

    def _info(self, origin: str, undo: Any) -> TensorInfo:
        tensor = self._file.tensors[origin]
        shape = tensor.shape[::-1] if undo is transpose else tensor.shape
        return TensorInfo(shape, _FLOATS.get(tensor.kind, np.dtype(np.float32)))

    def _published_dtype(self) -> np.dtype[Any]:
        """The embedding's, or bfloat16 where that is quantized: what was quantized was nearly always that."""
        return _FLOATS.get(self._file.tensors["token_embd.weight"].kind, np.dtype(ml_dtypes.bfloat16))

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """A view of the file where the tensor is stored in `dtype` and unchanged, else a new array."""
        origin, undo = self._origins[name]
        dtype = dtype or self.tensors[name].dtype
        if undo is None:
            return self._file.read(origin, dtype)
        # Undone before the cast: a norm of 1.004 minus one is 0.004, but bfloat16 rounds 1.004 to 1.
        exact = self._file.read(origin, self.tensors[name].dtype)
        return undo(exact, self.config).astype(dtype, copy=False)

    def release(self, name: str) -> None:
        """Gives back the memory that reading a tensor took."""
        self._file.release(self._origins[name][0])

    def close(self) -> None:
        """Forgets the file; it is unmapped when the last view of it is gone."""
        self._origins = {}
        self.tensors = {}
        del self._file


def _origins(file: GGUFFile, names: Names) -> dict[str, tuple[str, Any]]:
    """By transformers' name: llama.cpp's, and what to undo. Unknown names stay, to be reported."""
    origins: dict[str, tuple[str, Any]] = {}
    for origin in file.tensors:
        if origin.rpartition(".")[0] in names.settings:
            continue
        name, undo = names.resolve(origin) or (origin, None)
        if name in origins:
            raise CheckpointError(f"{file.path}: tensors {origins[name][0]!r} and {origin!r} are both {name}")
        origins[name] = (origin, undo)
    return origins
