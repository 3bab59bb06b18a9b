"""Folders of safetensors: views of the file, shards, and damaged headers."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from converters.checkpoint import open_checkpoint
from converters.errors import CheckpointError
from converters.safetensors import SafetensorsCheckpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = {"architectures": ["LlamaForCausalLM"]}


def folder(path: Path, *, config: dict[str, Any] | None = None, **files: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    for name, content in files.items():
        (path / f"{name}.safetensors").write_bytes(content)
    return path


def by_hand(header: Any, payload: int = 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(payload)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.int8, ml_dtypes.float8_e4m3fn], ids=str)
def test_what_the_library_writes_is_read(dtype: Any, tmp_path: Path):
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    save_file({"a": values, "b": values[:1]}, folder(tmp_path) / "model.safetensors", {"format": "pt"})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert {name: tuple(info) for name, info in checkpoint.tensors.items()} == {
        "a": ((3, 5), values.dtype),
        "b": ((1, 5), values.dtype),
    }
    np.testing.assert_array_equal(checkpoint.read("a"), values)
    np.testing.assert_array_equal(checkpoint.read("a", BF16), values.astype(BF16))


def test_reading_copies_nothing(tmp_path: Path):
    values = np.random.default_rng(0).standard_normal((300, 50)).astype(BF16)
    save_file({"a": values}, folder(tmp_path) / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    view = checkpoint.read("a", BF16)
    assert not view.flags.owndata
    assert not view.flags.writeable
    checkpoint.release("a")
    checkpoint.close()
    np.testing.assert_array_equal(view, values)


def shards(path: Path) -> dict[str, np.ndarray]:
    tensors = {name: np.full((2, 2), i, np.float32) for i, name in enumerate("abc")}
    folder(path)
    save_file({"a": tensors["a"]}, path / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, path / "model-00002-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 if name == 'a' else 2}-of-00002.safetensors" for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_shards(tmp_path: Path):
    tensors = shards(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert set(checkpoint.tensors) == set(tensors)
    for name, values in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), values)


def test_a_missing_shard_names_file_and_tensor(tmp_path: Path):
    shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"tensor 'b' .* model-00002-of-00002\.safetensors, which is missing"
    ):
        open_checkpoint(str(tmp_path))


def test_a_shard_without_its_tensor(tmp_path: Path):
    shards(tmp_path)
    save_file({"b": np.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"tensor 'c' .* model-00002-of-00002\.safetensors, which does not"
    ):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_stays_in_its_folder(file: str, tmp_path: Path):
    folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match=r"tensor 'a' .* outside the folder"):
        open_checkpoint(str(tmp_path))


def test_an_index_without_a_map(tmp_path: Path):
    folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json: has no 'weight_map'"):
        open_checkpoint(str(tmp_path))


def test_several_files_need_an_index(tmp_path: Path):
    folder(tmp_path, one=by_hand({}), two=by_hand({}))
    with pytest.raises(CheckpointError, match=r"2 safetensors files but no model\.safetensors\.index\.json"):
        open_checkpoint(str(tmp_path))


def test_one_file_of_another_name(tmp_path: Path):
    folder(tmp_path, weights=by_hand({"a": entry()}, 8))
    assert set(open_checkpoint(str(tmp_path)).tensors) == {"a"}


LIES = {
    "nothing": (b"", "0 bytes, too short"),
    "a header longer than the file": (struct.pack("<Q", 2**60) + bytes(8), "claims 1,152,921"),
    "a header that is not JSON": (by_hand(b"{]"), "not JSON"),
    "a header that is not text": (by_hand(b"\xff\xfe"), "not JSON"),
    "a header that nests without end": (by_hand(b"[" * 100_000), "not JSON"),
    "a header that is a list": (by_hand([]), "not a table"),
    "an end past the file": (
        by_hand({"t": entry(shape=[1000], offsets=[0, 4000])}),
        "'t' ends at byte .* cut off",
    ),
    "a size that is not the shape's": (
        by_hand({"t": entry(shape=[3])}),
        "'t' .* needs 12 bytes, .* 0 to 8",
    ),
    "a shape that overflows": (by_hand({"t": entry(shape=[2**62, 8])}), "'t' .* needs 147,573,952"),
    "offsets the wrong way round": (by_hand({"t": entry(offsets=[8, 0])}), "'t' .* 8 to 0"),
    "a negative offset": (by_hand({"t": entry(offsets=[-8, 0])}), "'t' .* -8"),
    "a negative dimension": (by_hand({"t": entry(shape=[-2, -1])}), "'t' has a malformed"),
    "a shape of booleans": (by_hand({"t": entry(shape=[True, 2])}), "'t' has a malformed"),
    "an entry of the wrong kind": (by_hand({"t": 3}), "'t' has a malformed"),
    "an entry without offsets": (by_hand({"t": {"dtype": "F32", "shape": [2]}}), "'t' has a malformed"),
    "a type that is not known": (by_hand({"t": entry(dtype="F4")}), "'t' is stored as F4"),
    "tensors that overlap": (by_hand({"t": entry(), "u": entry(offsets=[4, 12])}), "'t' and 'u' overlap"),
    "a name twice": (by_hand(b'{"t": 1, "t": 2}'), "'t' is there twice"),
}


@pytest.mark.parametrize(("content", "message"), LIES.values(), ids=LIES)
def test_a_lie_is_an_error_that_names_what_lies(content: bytes, message: str, tmp_path: Path):
    folder(tmp_path, model=content)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(str(tmp_path))
    assert "model.safetensors" in str(raised.value)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = folder(tmp_path_factory.mktemp("fuzz") / "m")
    save_file({name: np.ones((4, 4), np.float32) for name in "abc"}, path / "model.safetensors")
    return path, (path / "model.safetensors").read_bytes()


@given(data=st.data())
def test_damage_is_read_or_refused(data: st.DataObject, scratch: tuple[Path, bytes]):
    path, good = scratch
    damaged = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (path / "model.safetensors").write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(str(path))
    except CheckpointError:
        return
    assert sum(checkpoint.read(name).nbytes for name in checkpoint.tensors) <= len(good)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({"torch_dtype": "float16"}, np.float16), ({"dtype": "bfloat16"}, BF16), ({}, np.float32)],
)
def test_the_dtype_of_auto(config: dict[str, Any], dtype: Any, tmp_path: Path):
    save_file(
        {"a": np.ones((9, 9), np.float32), "n": np.ones(2, np.float16)},
        folder(tmp_path, config=config) / "model.safetensors",
    )
    assert open_checkpoint(str(tmp_path)).dtype == dtype


def test_generation_config_is_optional(tmp_path: Path):
    save_file({"a": np.ones(2)}, folder(tmp_path) / "model.safetensors")
    assert open_checkpoint(str(tmp_path)).generation_config == {}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert open_checkpoint(str(tmp_path)).generation_config == {"temperature": 0.6}


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_cannot_be_read(text: str, tmp_path: Path):
    save_file({"a": np.ones(2)}, folder(tmp_path) / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(tmp_path))


def test_no_config(tmp_path: Path):
    save_file({"a": np.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        open_checkpoint(str(tmp_path))
