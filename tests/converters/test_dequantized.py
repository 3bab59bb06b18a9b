"""Blocks with scales read as weights: MXFP4 and float8."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.blank import BlankCheckpoint
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.errors import CheckpointError

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
FLOAT8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 8]}


def write(folder: Path, tensors: dict[str, np.ndarray], quantization: dict[str, Any]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 1, "quantization_config": quantization}))
    return open_checkpoint(str(folder))


def mxfp4() -> dict[str, np.ndarray]:
    """Two experts of three outputs and 64 inputs."""
    random = np.random.default_rng(0)
    return {
        "experts.down_proj_blocks": random.integers(0, 256, (2, 3, 2, 16)).astype(np.uint8),
        "experts.down_proj_scales": random.integers(120, 131, (2, 3, 2)).astype(np.uint8),
        "norm.weight": np.ones(3, np.float32),
    }


def test_mxfp4(tmp_path: Path) -> None:
    """The format's own words: two numbers of sign, two bits of exponent, one of mantissa in each byte."""
    stored = mxfp4()
    checkpoint = write(tmp_path, stored, MXFP4)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    numbers = magnitudes + [-m for m in magnitudes]
    expected = np.zeros((2, 64, 3))
    for expert, output, block, byte in np.ndindex(2, 3, 2, 16):
        two = int(stored["experts.down_proj_blocks"][expert, output, block, byte])
        scale = 2.0 ** (int(stored["experts.down_proj_scales"][expert, output, block]) - 127)
        first = 32 * block + 2 * byte
        expected[expert, first : first + 2, output] = [numbers[two & 15] * scale, numbers[two >> 4] * scale]
    assert set(checkpoint.tensors) == {"experts.down_proj", "norm.weight"}
    assert checkpoint.tensors["experts.down_proj"].shape == (2, 64, 3)
    np.testing.assert_array_equal(checkpoint.read("experts.down_proj"), expected)
    low = checkpoint.read("experts.down_proj", np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(low.astype(np.float64), expected)  # which bfloat16 holds exactly
    np.testing.assert_array_equal(checkpoint.read("norm.weight"), 1.0)
    assert checkpoint.dtype == ml_dtypes.bfloat16
    assert "quantization_config" not in checkpoint.config
    checkpoint.release("experts.down_proj")
    checkpoint.close()


def test_float8_with_blocks_that_are_cut_off(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(10, 20)).astype(ml_dtypes.float8_e4m3fn)
    scales = random.random((3, 3), np.float32)
    checkpoint = write(tmp_path, {"q.weight": values, "q.weight_scale_inv": scales}, FLOAT8)
    expected = [[np.float32(values[r, c]) * scales[r // 4, c // 8] for c in range(20)] for r in range(10)]
    assert set(checkpoint.tensors) == {"q.weight"}
    np.testing.assert_array_equal(checkpoint.read("q.weight"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"experts.down_proj_scales": None},
            "'experts.down_proj_blocks' has no scales: .*_scales' is missing",
        ),
        (
            {"experts.down_proj_scales": np.zeros((2, 3, 1), np.uint8)},
            r"has the shape \[2, 3, 1\]; the blocks of 'experts.down_proj_blocks' need \[2, 3, 2\]",
        ),
        ({"experts.down_proj_blocks": np.zeros((2, 3, 2, 8), np.uint8)}, "does not hold blocks of MXFP4"),
    ],
)
def test_damaged_blocks_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = {name: array for name, array in (mxfp4() | change).items() if array is not None}
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path, tensors, MXFP4)


def test_other_quantizations_are_left_for_the_model_to_refuse(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"norm.weight": np.ones(3, np.float32)}, {"quant_method": "gptq"})
    assert checkpoint.config["quantization_config"] == {"quant_method": "gptq"}


def test_without_weights_the_config_is_the_same(tmp_path: Path) -> None:
    assert write(tmp_path, mxfp4(), MXFP4).config == BlankCheckpoint(tmp_path).config == {"hidden_size": 1}
