"""Checkpoints of small numbers in blocks with a scale each, read as the weights that they stand for.

Two forms are read, as published: MXFP4 (gpt-oss), and float8 in blocks (DeepSeek-V3, Qwen3). The model gets
weights of its dtype, which take two to four times the memory of what is stored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from converters.checkpoint import Checkpoint, TensorInfo
from converters.errors import CheckpointError

MXFP4_BLOCK = 32
"""Numbers that share a scale (OCP Microscaling Formats 1.0, section 5.3)."""


@dataclass(frozen=True)
class Blocks:
    """One weight: the tensors that hold it, and what it is.

    Attributes:
        values, scales: names of tensors.
        dequantize: takes both, and a dtype.
    """

    values: str
    scales: str
    info: TensorInfo
    dequantize: Callable[[np.ndarray, np.ndarray, np.dtype[Any]], np.ndarray]


def is_read(config: Mapping[str, Any]) -> bool:
    """Whether a config's `quantization_config` says one of the two forms."""
    about = config.get("quantization_config")
    if not isinstance(about, Mapping):
        return False
    block = about.get("weight_block_size")
    in_blocks = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    return about.get("quant_method") == "mxfp4" or (about.get("quant_method") == "fp8" and in_blocks)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model that is read: for it nothing is quantized, where that can be undone."""
    return {
        key: value for key, value in config.items() if key != "quantization_config" or not is_read(config)
    }


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of plain weights; the same one if it is not quantized, or in another way.

    Raises:
        CheckpointError: blocks without scales, or of shapes that do not go together.
    """
    return DequantizedCheckpoint(checkpoint) if is_read(checkpoint.config) else checkpoint


class DequantizedCheckpoint:
    """What `dequantized` gives; see `Checkpoint`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.config = without_quantization(checkpoint.config)
        self.generation_config = checkpoint.generation_config
        wide = checkpoint.dtype in (np.float32, np.float16, ml_dtypes.bfloat16)
        self.dtype = checkpoint.dtype if wide else np.dtype(ml_dtypes.bfloat16)
        self._checkpoint = checkpoint
        about = checkpoint.config["quantization_config"]
        if about["quant_method"] == "mxfp4":
            self._blocks = _find_mxfp4(checkpoint)
        else:
            self._blocks = _find_float8(checkpoint, *about["weight_block_size"])
        parts = {name for one in self._blocks.values() for name in (one.values, one.scales)}
        plain = {name: info for name, info in checkpoint.tensors.items() if name not in parts}
        made = {name: one.info for name, one in self._blocks.items()}
        self.tensors: Mapping[str, TensorInfo] = {**plain, **made}

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """A new array where the tensor is made of blocks."""
        if name not in self._blocks:
            return self._checkpoint.read(name, dtype)
        one = self._blocks[name]
        values, scales = self._checkpoint.read(one.values), self._checkpoint.read(one.scales)
        return one.dequantize(values, scales, np.dtype(one.info.dtype if dtype is None else dtype))

    def release(self, name: str) -> None:
        """Gives back the memory that reading a tensor took."""
        one = self._blocks.get(name)
        for part in (name,) if one is None else (one.values, one.scales):
            self._checkpoint.release(part)

    def close(self) -> None:
        """Lets go of the files."""
        self._checkpoint.close()


def _find_mxfp4(checkpoint: Checkpoint) -> dict[str, Blocks]:
    """`NAME_blocks`, uint8 `[experts, out, in / 32, 16]`, and `NAME_scales` `[experts, out, in / 32]`."""
    found = {}
    for values, info in checkpoint.tensors.items():
        if values.endswith("_blocks"):
            name = values.removesuffix("_blocks")
            scales = _scales(checkpoint, values, f"{name}_scales", info.shape[:-1])
            if len(info.shape) != 4 or info.shape[-1] != MXFP4_BLOCK // 2 or info.dtype != np.uint8:
                raise CheckpointError(f"{checkpoint.path}: tensor {values!r} does not hold blocks of MXFP4")
            experts, outputs, blocks, _ = info.shape
            shape = (experts, blocks * MXFP4_BLOCK, outputs)
            found[name] = Blocks(values, scales, TensorInfo(shape, np.dtype(np.float32)), _dequantize_mxfp4)
    return found


def _find_float8(checkpoint: Checkpoint, rows: int, columns: int) -> dict[str, Blocks]:
    """`NAME`, float8 `[out, in]`, and `NAME_scale_inv`, a float32 for each block of it."""

    def dequantize(values: np.ndarray, scales: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        return _dequantize_float8(values, scales, dtype, rows, columns)

    found = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype == ml_dtypes.float8_e4m3fn:
            if len(info.shape) != 2:
                raise CheckpointError(f"{checkpoint.path}: tensor {name!r} of float8 is no matrix")
            blocks = (-(-info.shape[0] // rows), -(-info.shape[1] // columns))
            scales = _scales(checkpoint, name, f"{name}_scale_inv", blocks)
            found[name] = Blocks(name, scales, TensorInfo(info.shape, np.dtype(np.float32)), dequantize)
    return found


def _scales(checkpoint: Checkpoint, values: str, scales: str, shape: tuple[int, ...]) -> str:
    info = checkpoint.tensors.get(scales)
    if info is None:
        raise CheckpointError(f"{checkpoint.path}: tensor {values!r} has no scales: {scales!r} is missing")
    if info.shape != shape:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {scales!r} has the shape {list(info.shape)}; the blocks of "
            f"{values!r} need {list(shape)}"
        )
    return scales


def _dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """`[experts, out, in / 32, 16]` to `[experts, in, out]`; the low half of a byte comes first."""
    halves = np.arange(256, dtype=np.uint8)[:, None] >> np.array([0, 4], np.uint8) & 0xF
    pairs = halves.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    experts, outputs, count, _ = blocks.shape
    weight = np.empty((experts, count * MXFP4_BLOCK, outputs), dtype)
    for expert in range(experts):
        values = pairs[blocks[expert]].reshape(outputs, count, MXFP4_BLOCK)
        values *= scales[expert].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[..., None]
        weight[expert] = values.reshape(outputs, -1).T
    return weight


def _dequantize_float8(
    values: np.ndarray, scales: np.ndarray, dtype: np.dtype[Any], rows: int, columns: int
) -> np.ndarray:
    """`[out, in]`, a row of blocks at a time."""
    weight = np.empty(values.shape, dtype)
    for block, row in enumerate(range(0, len(values), rows)):
        scale = np.repeat(scales[block].astype(np.float32), columns)[: values.shape[1]]
        weight[row : row + rows] = values[row : row + rows].astype(np.float32) * scale
    return weight
