"""Our Orbax folders, as a library: what is saved comes back, whole or in shards."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from converters import orbax
from converters.checkpoint import ShardedCheckpoint, open_checkpoint
from converters.errors import CheckpointError

ARRAYS = {
    "layers.0.mlp.down.weight": jnp.arange(64.0).reshape(16, 4),
    "norm.weight": jnp.ones(4, "bfloat16"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    orbax.save(tmp_path / "m", ARRAYS, {"dtype": "bfloat16"}, {"top_k": 5})
    return tmp_path / "m"


def test_what_is_saved_comes_back(folder: Path):
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config == {"dtype": "bfloat16"}
    assert checkpoint.generation_config == {"top_k": 5}
    assert checkpoint.dtype == jnp.bfloat16
    for name, values in ARRAYS.items():
        assert tuple(checkpoint.tensors[name]) == (values.shape, values.dtype)
        read = checkpoint.read(name)
        assert read.dtype == values.dtype
        np.testing.assert_array_equal(read, values)
    assert checkpoint.read("norm.weight", np.dtype(np.float32)).dtype == np.float32


def test_shards_are_restored_in_place(folder: Path):
    checkpoint = open_checkpoint(str(folder))
    assert isinstance(checkpoint, ShardedCheckpoint)
    mesh = jax.make_mesh((4,), ("x",))
    name = "layers.0.mlp.down.weight"
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    wanted = {name: jax.ShapeDtypeStruct((16, 4), jnp.dtype("bfloat16"), sharding=sharding)}
    restored = checkpoint.restore(wanted)
    assert restored.keys() == wanted.keys()
    assert restored[name].sharding == sharding
    for shard in restored[name].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data, np.float32), ARRAYS[name][shard.index])


def test_large_arrays_are_cut_into_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that a device need not read the whole of an array for its part."""
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 1 << 16)
    big = np.random.default_rng(0).standard_normal((1024, 256), np.float32)
    orbax.save(tmp_path / "m", {"big": jnp.asarray(big)}, {}, {})
    np.testing.assert_array_equal(open_checkpoint(str(tmp_path / "m")).read("big"), big)
    metadata = json.loads((tmp_path / "m" / "weights.orbax" / "array_metadatas" / "process_0").read_text())
    piece = metadata["array_metadatas"][0]["array_metadata"]["chunk_shape"]
    assert 4 * np.prod(piece) <= 1 << 16


def test_a_name_that_is_not_there(folder: Path):
    with pytest.raises(KeyError):
        open_checkpoint(str(folder)).read("nothing")


def test_a_folder_without_its_weights(folder: Path):
    for file in (folder / "weights.orbax").rglob("_METADATA"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"weights\.orbax cannot be read"):
        open_checkpoint(str(folder))
