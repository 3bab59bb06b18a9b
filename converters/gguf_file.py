"""The GGUF container: metadata and tensor table; every count, length and offset is checked before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` has a reader too, but it
believes the file; here it serves for the block formats (`gguf.dequantize`).
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from converters.errors import CheckpointError
from converters.mapped import MappedFile

VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
MAX_NESTING = 4
CHUNK_ELEMENTS = 1 << 17
"""Elements dequantized at a time: the float32 temporaries stay in the cache (the fastest of 2^14 to 2^22)."""

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "B",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
READABLE = frozenset(
    GGMLQuantizationType[name]
    for name in (
        *("F32", "F16", "BF16"),
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    )
)
"""Tensor types that are read."""


class GGUFTensor(NamedTuple):
    """One entry of the tensor table."""

    shape: tuple[int, ...]
    """Slowest dimension first, as numpy has it (the file has it the other way round)."""
    kind: GGMLQuantizationType
    start: int
    """Bytes from the beginning of the file."""
    nbytes: int


class GGUFFile:
    """An open file: `metadata` by key, `tensors` by llama.cpp's names.

    Raises:
        CheckpointError: not a GGUF file, cut off, or inconsistent; the message names the key or tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.map = MappedFile(path)
        cursor = _Cursor(self.map)
        num_tensors, num_keys = cursor.header()
        self.metadata = dict(cursor.pairs(num_keys))
        self.tensors = self._table(cursor, num_tensors)

    def _table(self, cursor: "_Cursor", num_tensors: int) -> dict[str, GGUFTensor]:
        alignment = self.metadata.get("general.alignment", 32)
        if not (type(alignment) is int and 0 < alignment <= MAX_ALIGNMENT and alignment.bit_count() == 1):
            raise CheckpointError(f"{self.path}: general.alignment={alignment!r} is not a power of two")
        entries = list(cursor.tensors(num_tensors))
        data = -(-cursor.position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in entries:
            where = f"{self.path}: tensor {name!r}"
            if name in tensors:
                raise CheckpointError(f"{where} is there twice")
            nbytes = _stored_size(where, shape, kind)
            if offset % alignment:
                raise CheckpointError(f"{where} begins at offset {offset:,}, not a multiple of {alignment}")
            if data + offset + nbytes > self.map.size:
                raise CheckpointError(
                    f"{where} ends at byte {data + offset + nbytes:,} of a file of {self.map.size:,}: "
                    "the file is cut off or damaged; download it again"
                )
            tensors[name] = GGUFTensor(shape, kind, data + offset, nbytes)
        last, last_end = "", 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < last_end:
                raise CheckpointError(f"{self.path}: tensors {last!r} and {name!r} overlap")
            last, last_end = name, tensor.start + tensor.nbytes
        return tensors

    def read(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        """One tensor in `dtype`: a view where it is stored so, else dequantized piece by piece."""
        tensor = self.tensors[name]
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(tensor.kind)
        if plain is not None:
            return self.map.view(tensor.start, tensor.shape, np.dtype(plain)).astype(dtype, copy=False)
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        blocks = self.map.view(tensor.start, (tensor.nbytes // block_bytes, block_bytes), np.dtype(np.uint8))
        out = np.empty((len(blocks), block), dtype)
        step = CHUNK_ELEMENTS // block
        # Damaged blocks may hold scales that overflow: they become inf, as they would anywhere else.
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), step):
                # As one row: the package works row by row, and rows of one block are ten times slower.
                piece = dequantize(blocks[first : first + step].reshape(1, -1), tensor.kind)
                out[first : first + step] = piece.reshape(-1, block)
        return out.reshape(tensor.shape)

    def release(self, name: str) -> None:
        """Gives back the memory that reading a tensor took."""
        self.map.release(self.tensors[name].start, self.tensors[name].nbytes)


def _stored_size(where: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    if kind not in READABLE:
        names = ", ".join(sorted(k.name for k in READABLE))
        raise CheckpointError(f"{where} is stored as {kind.name}, which is not read; read are {names}")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise CheckpointError(
            f"{where} has rows of {shape[-1]}, not a multiple of the {block} of {kind.name}"
        )
    return math.prod(shape) // block * block_bytes


class _Cursor:
    """Reads forward through the header and never past the end of the file."""

    def __init__(self, file: MappedFile) -> None:
        self.data = file.data
        self.path = file.path
        self.position = 0
        self.reading = "the header"

    def fail(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {self.reading} at byte {self.position:,} {why}; the file is cut off or damaged: "
            "download it again"
        )

    def take(self, size: int) -> int:
        """Moves past `size` bytes and returns where they begin."""
        begin = self.position
        if size > len(self.data) - begin:
            raise self.fail(f"needs {size:,} bytes, past the end of the file")
        self.position = begin + size
        return begin

    def unpack(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        size = self.unpack("Q")
        begin = self.take(size)
        try:
            return self.data[begin : begin + size].decode()
        except UnicodeDecodeError as error:
            raise self.fail("is not text in UTF-8") from error

    def count(self, smallest: int) -> int:
        """A number of items of at least `smallest` bytes each; the rest of the file must have room."""
        count = self.unpack("Q")
        if count * smallest > len(self.data) - self.position:
            raise self.fail(f"claims {count:,} items, more than the file has room for")
        return count

    def header(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata keys."""
        begin = self.take(4)
        if self.data[begin : begin + 4] != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file (it does not begin with the letters GGUF)")
        version = self.unpack("I")
        if version not in VERSIONS:
            hint = "it is big-endian" if version >> 16 else "convert it again with a newer llama.cpp"
            raise CheckpointError(f"{self.path}: GGUF version {version} is not read ({hint})")
        return self.count(smallest=24), self.count(smallest=13)

    def pairs(self, count: int) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for index in range(count):
            self.reading = f"metadata key {index}"
            key = self.string()
            self.reading = f"metadata {key!r}"
            if key in seen:
                raise self.fail("is there twice")
            seen.add(key)
            yield key, self.value(self.enum(GGUFValueType), 0)

    def enum(self, kind: Any) -> Any:
        number = self.unpack("I")
        try:
            return kind(number)
        except ValueError:
            raise self.fail(f"has the unknown type {number}") from None

    def value(self, kind: GGUFValueType, depth: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            return self.array(depth)
        value = self.unpack(_SCALARS[kind])
        return bool(value) if kind == GGUFValueType.BOOL else value

    def array(self, depth: int) -> list[Any]:
        if depth == MAX_NESTING:
            raise self.fail(f"nests more than {MAX_NESTING} arrays")
        kind = self.enum(GGUFValueType)
        if kind in _SCALARS:
            code = _SCALARS[kind]
            count = self.count(struct.calcsize("<" + code))
            begin = self.take(count * struct.calcsize("<" + code))
            values = list(struct.unpack_from(f"<{count}{code}", self.data, begin))
            return [bool(value) for value in values] if kind == GGUFValueType.BOOL else values
        if kind == GGUFValueType.STRING:
            return self.strings(self.count(smallest=8))
        return [self.value(kind, depth + 1) for _ in range(self.count(smallest=12))]

    def strings(self, count: int) -> list[str]:
        """As `string` reads them, one after the other: a vocabulary and its merges have 100,000."""
        data, position, size = self.data, self.position, struct.Struct("<Q")
        found = []
        for _ in range(count):
            begin = position + size.size
            if begin > len(data) or (end := begin + size.unpack_from(data, position)[0]) > len(data):
                break
            try:
                found.append(data[begin:end].decode())
            except UnicodeDecodeError:
                break
            position = end
        self.position = position
        if len(found) < count:
            self.string()  # says what is wrong with it
        return found

    def tensors(self, count: int) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType, int]]:
        for index in range(count):
            self.reading = f"entry {index} of the tensor table"
            name = self.string()
            self.reading = f"tensor {name!r}"
            num_dims = self.unpack("I")
            if not 1 <= num_dims <= MAX_DIMS:
                raise self.fail(f"claims {num_dims} dimensions")
            dims = [self.unpack("Q") for _ in range(num_dims)]
            if 0 in dims:
                raise self.fail(f"has an empty dimension: {dims}")
            yield name, tuple(reversed(dims)), self.enum(GGMLQuantizationType), self.unpack("Q")
