"""Folders of safetensors files, one or sharded by an index, read through memory maps.

Format: https://github.com/huggingface/safetensors#format. The header is read here, and not by the library,
because its reader copies every tensor, and because a damaged file must be reported by tensor.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from converters.checkpoint import TensorInfo
from converters.errors import CheckpointError
from converters.mapped import MappedFile

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
MAX_HEADER = 100_000_000
"""Bytes; the limit that the reference implementation has."""
INDEX_FILE = "model.safetensors.index.json"


class _Entry(NamedTuple):
    info: TensorInfo
    file: "SafetensorsFile"
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.info.shape) * self.info.dtype.itemsize


class SafetensorsFile:
    """One memory-mapped file. The whole header is checked when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.map = MappedFile(path)
        self.entries = self._read_header(self.map.data, self.map.size)

    def _read_header(self, data: Any, size: int) -> dict[str, _Entry]:
        if size < 8:
            raise CheckpointError(
                f"{self.path}: {size} bytes, too short to be a safetensors file; download it again"
            )
        (length,) = struct.unpack_from("<Q", data, 0)
        if length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{self.path}: its header claims {length:,} bytes of a file of {size:,}; download it again"
            )
        try:
            header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=self._unique)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path}: its header is not JSON ({error}); download it again"
            ) from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: its header is not a table of tensors; download it again")
        header.pop("__metadata__", None)
        entries = {name: self._entry(name, value, 8 + length, size) for name, value in header.items()}
        self._refuse_overlaps(entries)
        return entries

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            raise CheckpointError(
                f"{self.path}: {next(n for n in names if names.count(n) > 1)!r} is there twice"
            )
        return table

    def _entry(self, name: str, value: Any, data: int, size: int) -> _Entry:
        where = f"{self.path}: tensor {name!r}"
        match value:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
                type(dim) is int and dim >= 0 for dim in shape
            ):
                pass
            case _:
                raise CheckpointError(f"{where} has a malformed header entry; download it again")
        if kind not in DTYPES:
            raise CheckpointError(
                f"{where} is stored as {kind}, which is not read; read are {', '.join(DTYPES)}"
            )
        nbytes = math.prod(shape) * DTYPES[kind].itemsize
        if not 0 <= begin <= end or end - begin != nbytes:
            raise CheckpointError(
                f"{where} of shape {shape} and type {kind} needs {nbytes:,} bytes, but its header claims "
                f"bytes {begin:,} to {end:,}; download it again"
            )
        if data + end > size:
            raise CheckpointError(
                f"{where} ends at byte {data + end:,} of a file of {size:,}: it is cut off; download it again"
            )
        return _Entry(TensorInfo(tuple(shape), DTYPES[kind]), self, data + begin)

    def _refuse_overlaps(self, entries: Mapping[str, _Entry]) -> None:
        last, last_end = "", 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            nbytes = math.prod(entry.info.shape) * entry.info.dtype.itemsize
            if nbytes and entry.start < last_end:
                raise CheckpointError(
                    f"{self.path}: tensors {last!r} and {name!r} overlap; download it again"
                )
            if nbytes:
                last, last_end = name, entry.start + nbytes


class SafetensorsCheckpoint:
    """A folder with `config.json` and safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self.generation_config = read_json(path / "generation_config.json", optional=True)
        self._entries = _open_files(path)
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info for name, entry in self._entries.items()}
        self.dtype = published_dtype(self.config, self.tensors)

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """A read-only view of the file; a copy if `dtype` is another one."""
        entry = self._entries[name]
        tensor = entry.file.map.view(entry.start, *entry.info)
        return tensor if dtype is None else tensor.astype(dtype, copy=False)

    def release(self, name: str) -> None:
        """Gives back the memory that reading a tensor took."""
        entry = self._entries[name]
        entry.file.map.release(entry.start, entry.nbytes)

    def close(self) -> None:
        """Forgets the files; each map is unmapped when the last view of it is gone."""
        self._entries = {}
        self.tensors = {}


def _open_files(path: Path) -> dict[str, _Entry]:
    index = path / INDEX_FILE
    if not index.is_file():
        files = sorted(path.glob("*.safetensors"))
        single = path / "model.safetensors"
        if single in files:
            files = [single]
        if len(files) > 1:
            raise CheckpointError(
                f"{path} holds {len(files)} safetensors files but no {INDEX_FILE} to say what is where"
            )
        return SafetensorsFile(files[0]).entries
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: has no 'weight_map' from tensor names to file names")
    opened: dict[str, SafetensorsFile] = {}
    entries = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise CheckpointError(f"{index}: tensor {name!r} is said to be in {file!r}, outside the folder")
        if file not in opened:
            if not (path / file).is_file():
                raise CheckpointError(f"{index}: tensor {name!r} is said to be in {file}, which is missing")
            opened[file] = SafetensorsFile(path / file)
        if name not in opened[file].entries:
            raise CheckpointError(f"{index}: tensor {name!r} is said to be in {file}, which does not have it")
        entries[name] = opened[file].entries[name]
    return entries


def published_dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> np.dtype[Any]:
    """What the config says, else the dtype that most of the weights' elements have."""
    named = config.get("dtype") or config.get("torch_dtype")
    known = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    if named in known:
        return np.dtype(known[named])
    sizes: dict[np.dtype[Any], int] = {}
    for info in tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + math.prod(info.shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default=np.dtype(np.float32))


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file; `{}` if it is optional and not there.

    Raises:
        CheckpointError: not there, or not a JSON object.
    """
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not a model: it has no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a table of settings")
    return value
