"""Weights into shards: from safetensors, GGUF and Orbax, on meshes of every size, in little memory."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from converters.errors import CheckpointError
from jaxllm.models import ModelRegistry, split
from jaxllm.models.converting import convert
from jaxllm.models.loading import load_weights
from jaxllm.parallel import make_mesh

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 125,  # no multiple of any mesh but one
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
SIZES = [1, 2, 4, 8]


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (125, 64), "lm_head.weight": (125, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        rows = {"q": 64, "k": 16, "v": 16, "o": 64}
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (rows[p], 64) for p in "qkvo"}
        shapes |= {f"{at}.self_attn.{p}_proj.bias": (rows[p],) for p in "qkvo"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (96, 64) for p in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (64, 96)}
        shapes |= {f"{at}.{norm}_layernorm.weight": (64,) for norm in ("input", "post_attention")}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(path: Path, stored: Mapping[str, np.ndarray] | None = None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(dict(tensors() if stored is None else stored), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    return path


def load(checkpoint: Checkpoint, size: int = 1, dtype: str = "float32") -> dict[str, jax.Array]:
    model = ModelRegistry.resolve(checkpoint.config)
    config = model.read_config(checkpoint.config, dtype=jnp.dtype(dtype), tensor_parallel_size=size)
    _, parameters = split(model, config)
    mesh = make_mesh(size)
    arrays = load_weights(checkpoint, model.rules, parameters, config.geometry, mesh, progress=False)
    for array, parameter in zip(arrays, parameters.values(), strict=True):
        kept = parameter.kept(mesh)
        assert (array.shape, array.dtype) == (kept.shape, kept.dtype)
        assert array.sharding.is_equivalent_to(kept.sharding, array.ndim)
    return dict(zip(parameters, arrays, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama") / "m")


@pytest.fixture(scope="module")
def converted(folder: Path) -> Path:
    return convert(open_checkpoint(str(folder)), folder.parent / "orbax", progress=False)


@pytest.mark.parametrize("size", SIZES)
def test_heads_land_where_they_belong(size: int, folder: Path):
    """Every query head beside the key-value head it attends with, copies where devices outnumber these."""
    qkv = np.asarray(load(open_checkpoint(str(folder)), size)["layers.1.attention.qkv.weight"])
    stored = {p: tensors()[f"model.layers.1.self_attn.{p}_proj.weight"].reshape(-1, 8, 64) for p in "qkv"}
    groups = max(2, size)
    assert qkv.shape == (64, groups, 8 // groups + 2, 8)
    for head in range(8):
        group, place = divmod(head, 8 // groups)
        np.testing.assert_array_equal(qkv[:, group, place].T, stored["q"][head])
        np.testing.assert_array_equal(qkv[:, group, -2].T, stored["k"][head // 4])
        np.testing.assert_array_equal(qkv[:, group, -1].T, stored["v"][head // 4])


@pytest.mark.parametrize("size", SIZES)
def test_the_vocabulary_is_padded_with_zeros(size: int, folder: Path):
    head = np.asarray(load(open_checkpoint(str(folder)), size)["head.weight"])
    np.testing.assert_array_equal(head[:125], tensors()["lm_head.weight"])
    assert head.shape[0] % size == 0
    assert not head[125:].any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_restores_what_safetensors_load(size: int, dtype: str, folder: Path, converted: Path):
    expected = load(open_checkpoint(str(folder)), size, dtype)
    restored = load(open_checkpoint(str(converted)), size, dtype)
    assert restored.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(restored[path]), np.asarray(array), err_msg=path)


def test_an_expert_that_is_missing_is_named(tmp_path: Path):
    golden = Path(__file__).parent / "goldens" / "mixtral"
    stored = load_file(golden / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    save_file({key: array for key, array in stored.items() if key != name}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((golden / "config.json").read_text())
    with pytest.raises(CheckpointError, match=rf"1 missing: {name}$"):
        load(open_checkpoint(str(tmp_path)))


def test_layers_that_predict_further_ahead_are_left_unread(tmp_path: Path):
    """DeepSeek-V3's layer 61; in layers that the model has, nothing may be left."""
    golden = Path(__file__).parent / "goldens" / "deepseek-v3"
    stored = load_file(golden / "model.safetensors")
    (tmp_path / "config.json").write_text((golden / "config.json").read_text())
    extra = {"model.layers.2.enorm.weight": stored["model.norm.weight"]}
    save_file(stored | extra, tmp_path / "model.safetensors")
    assert load(open_checkpoint(str(tmp_path)))
    extra = {"model.layers.1.enorm.weight": stored["model.norm.weight"]}
    save_file(stored | extra, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 left over: model\.layers\.1\.enorm\.weight"):
        load(open_checkpoint(str(tmp_path)))


def test_what_is_converted_keeps_its_settings(folder: Path, tmp_path: Path):
    class Tokenizer:
        def save_pretrained(self, path: Path) -> None:
            (path / "tokenizer.json").write_text("{}")

    source = write(tmp_path / "source")
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    made = convert(
        open_checkpoint(str(source)),
        tmp_path / "made",
        tokenizer=Tokenizer(),
        dtype=jnp.dtype("bfloat16"),
        progress=False,
    )
    checkpoint = open_checkpoint(str(made), load_format="orbax")
    assert checkpoint.generation_config == {"temperature": 0.5}
    assert checkpoint.config == {k: v for k, v in CONFIG.items() if k != "torch_dtype"} | {
        "dtype": "bfloat16"
    }
    assert checkpoint.dtype == jnp.bfloat16
    assert {info.dtype for info in checkpoint.tensors.values()} == {jnp.dtype("bfloat16")}
    assert (made / "tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]


def test_a_folder_in_use_is_not_overwritten(folder: Path, converted: Path, tmp_path: Path):
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        convert(checkpoint, converted, progress=False)
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; make it first"):
        convert(checkpoint, tmp_path / "nowhere" / "made", progress=False)
    (tmp_path / "empty").mkdir()
    assert open_checkpoint(str(convert(checkpoint, tmp_path / "empty", progress=False))).tensors


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path):
    source = write(tmp_path / "source")

    class Broken:
        def save_pretrained(self, path: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        convert(open_checkpoint(str(source)), tmp_path / "made", tokenizer=Broken(), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_damaged_orbax_folder(folder: Path, tmp_path: Path):
    made = convert(open_checkpoint(str(folder)), tmp_path / "made", progress=False)
    for file in (made / "weights.orbax").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"weights\.orbax cannot be read .* convert the model again"):
        load(open_checkpoint(str(made)))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"jaxllm_format": 99}))
    with pytest.raises(CheckpointError, match="jaxllm_format=99, and 1 is what is read"):
        open_checkpoint(str(made))


def test_all_that_does_not_fit_is_in_one_error(tmp_path: Path):
    stored = tensors()
    del stored["model.norm.weight"]
    del stored["model.layers.0.self_attn.k_proj.weight"]
    stored["model.layers.0.mystery.weight"] = np.ones(3, np.float32)
    stored["model.layers.1.mlp.up_proj.weight"] = np.ones((97, 64), np.float32)
    stored["model.embed_tokens.weight"] = np.ones((124, 64), np.float32)
    with pytest.raises(CheckpointError) as raised:
        load(open_checkpoint(str(write(tmp_path / "m", stored))))
    message = str(raised.value)
    assert "2 missing: model.layers.0.self_attn.k_proj.weight; model.norm.weight" in message
    assert "1 left over: model.layers.0.mystery.weight" in message
    assert "2 of the wrong shape" in message
    assert "model.embed_tokens.weight [124, 64] (for embedding.weight [125, 64])" in message
    assert (
        "model.layers.1.mlp.up_proj.weight [97, 64] (for layers.1.mlp.gate_up.weight [64, 2, 96])" in message
    )


def test_an_orbax_folder_of_another_model(converted: Path):
    checkpoint = open_checkpoint(str(converted))
    checkpoint.config |= {"num_hidden_layers": 1, "intermediate_size": 88, "tie_word_embeddings": True}
    with pytest.raises(CheckpointError) as raised:
        load(checkpoint)
    message = str(raised.value)
    assert "left over: head.weight; layers.1." in message
    assert "layers.0.mlp.down.weight [96, 64] (wanted: [88, 64])" in message


class Watched:
    """A checkpoint that counts the bytes read and not yet released."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner = inner
        self.config, self.generation_config = inner.config, inner.generation_config
        self.path, self.dtype = inner.path, inner.dtype
        self.tensors: Mapping[str, TensorInfo] = inner.tensors
        self.held: dict[str, int] = {}
        self.most = 0
        self.together = 0

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        array = self.inner.read(name, dtype)
        self.held[name] = array.nbytes
        self.most = max(self.most, sum(self.held.values()))
        self.together = max(self.together, len(self.held))
        return array

    def release(self, name: str) -> None:
        del self.held[name]

    def close(self) -> None:
        self.inner.close()


def test_few_tensors_are_in_flight(folder: Path):
    checkpoint = Watched(open_checkpoint(str(folder)))
    load(checkpoint)
    assert not checkpoint.held
    assert checkpoint.together > 3  # more than one parameter's sources
    assert checkpoint.most <= max(array.nbytes for array in load(checkpoint.inner).values())


MEMORY = """
    import sys, threading, jax, jax.numpy as jnp
    from converters.checkpoint import open_checkpoint
    from jaxllm.models import ModelRegistry, split
    from jaxllm.models.loading import load_weights
    from jaxllm.parallel import make_mesh

    def resident():
        fields = dict(line.split(":") for line in open("/proc/self/status"))
        return int(fields["VmRSS"].split()[0]) * 1024

    def load(path):
        checkpoint = open_checkpoint(path)
        model = ModelRegistry.resolve(checkpoint.config)
        config = model.read_config(checkpoint.config, dtype=jnp.dtype("bfloat16"), tensor_parallel_size=1)
        _, parameters = split(model, config)
        mesh = make_mesh(1)
        return load_weights(checkpoint, model.rules, parameters, config.geometry, mesh, progress=False)

    def watch():
        global peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    load(sys.argv[1])  # imports, threads and code
    peak, done = resident(), threading.Event()
    before = peak
    thread = threading.Thread(target=watch)
    thread.start()
    arrays = load(sys.argv[2])
    done.set()
    thread.join()
    print(peak - before, sum(a.nbytes for a in arrays), max(a.nbytes for a in arrays))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_the_host_holds_the_model_and_two_tensors(stored: str, folder: Path, tmp_path: Path):
    """On CPU the devices' memory is the host's, and pages of the file count too until they are released."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 25000, "num_hidden_layers": 12}
    big = {
        name: np.zeros([_grown(length) for length in values.shape], jnp.dtype(stored))
        for name, values in tensors().items()
        if ".layers." not in name
    }
    for layer in range(12):
        for name, values in tensors().items():
            if ".layers.1." in name:
                shape = [_grown(length) for length in values.shape]
                big[name.replace(".1.", f".{layer}.")] = np.zeros(shape, jnp.dtype(stored))
    path = write(tmp_path / "big", big, **sizes, head_dim=32)
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(folder), str(path)]
    peak, model, largest = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert model > 40e6
    assert peak > 0.9 * model  # or the measurement is wrong
    assert peak <= model + 2 * largest


def _grown(length: int) -> int:
    return {125: 25000, 64: 256, 96: 1024, 16: 64}[length]
