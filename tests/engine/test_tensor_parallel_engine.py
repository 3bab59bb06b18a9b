"""The engine on several devices: the same tokens, everything cut, and only sums between devices."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from small import CHECKPOINTS, golden, greedy, small_engine

from jaxllm import Engine, SamplingParams
from jaxllm.parallel import make_mesh
from pallas_kernels.paged_attention import PageGeometry
from pallas_kernels.targets.compiled import COLLECTIVES, CompiledText

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZES: dict[str, Any] = {
    "max_model_len": 96,
    "num_pages": 60,
    "max_num_batched_tokens": 8,
    "enforce_eager": True,
}
MODELS = ("llama", "gemma3")
"""Both have 8 heads and 2 of keys and values: fewer than the devices."""
LAYERS = {"llama": 2, "gemma3": 3}


def cases(model: str) -> tuple[list[list[int]], list[SamplingParams]]:
    """Greedy requests whose tokens are golden, and sampled ones."""
    prompts = [golden(model)[f"prompt{row}"].tolist() for row in (0, 1)]
    sampled = SamplingParams(
        temperature=1.0,
        seed=4,
        top_p=0.9,
        presence_penalty=0.5,
        max_tokens=8,
        ignore_eos=True,
        detokenize=False,
    )
    return [*prompts, prompts[0][:9]], [greedy(16, logprobs=2), greedy(16), sampled]


def run(engine: Engine, model: str) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in engine.generate(*cases(model))]


def collectives(text: str | None) -> list[tuple[str, str]]:
    """What a program sends between devices: of each such instruction the result's shape, and the kind."""
    found = CompiledText.parse(text or "").instructions
    return [(one.result.partition("{")[0], one.opcode) for one in found if one.opcode in COLLECTIVES]


def forward_text(engine: Engine) -> str:
    """The compiled forward pass that served the largest steps."""
    runner = engine._core.runner
    largest = runner.lowering.buckets.largest
    text = runner.programs["forward", largest.tokens, largest.rows].as_text()
    assert text is not None
    return text


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, list[list[int]]]:
    """Each model's tokens."""
    found = {}
    for model in MODELS:
        with small_engine(model, **SIZES) as engine:
            found[model] = run(engine, model)
    return found


@pytest.mark.parametrize(
    ("model", "devices"), [("llama", 2), ("llama", 4), ("llama", 8), ("gemma3", 4), ("gemma3", 8)]
)
def test_cut_engine(model: str, devices: int, on_one_device: dict[str, list[list[int]]]) -> None:
    with small_engine(model, tensor_parallel_size=devices, **SIZES) as engine:
        found = run(engine, model)
        assert found == on_one_device[model]
        assert found[:2] == [golden(model)[f"tokens{row}"].tolist() for row in (0, 1)]
        check_shards(engine, devices)
        check_collectives(engine, LAYERS[model])


def check_shards(engine: Engine, devices: int) -> None:
    """Each device holds its part of every matrix and every page; vectors of the model's width are whole."""
    runner = engine._core.runner
    params, cache, _ = runner.stages[0].arrays
    hidden = runner.lowering.model.hidden_size
    for array in (*params, *cache):
        assert len(array.addressable_shards) == devices
        sizes = {shard.data.size for shard in array.addressable_shards}
        whole = array.ndim == 1 and array.size <= hidden
        assert sizes == {array.size if whole else array.size // devices}, array.shape
    model, sizes = runner.lowering.model, runner.lowering.sizes
    assert model.cache_heads == max(2, devices)
    geometry = PageGeometry(
        runner.num_pages, sizes.page_size, model.cache_heads, model.head_dim, jnp.dtype(model.dtype)
    )
    pool = runner.lowering.backend.layout.array(geometry)
    assert {(pool.shape, pool.dtype) for pool in cache} == {(pool.shape, pool.dtype)}


def check_collectives(engine: Engine, layers: int) -> None:
    """One sum for the embedding and two for each layer; of weights and pages nothing moves."""
    found = collectives(forward_text(engine))
    kinds = [kind for _, kind in found]
    assert set(kinds) == {"all-reduce", "all-gather"}
    assert kinds.count("all-reduce") == 1 + 2 * layers
    lowering = engine._core.runner.lowering
    logits = f"f32[{lowering.buckets.largest.sampled},{lowering.model.geometry.padded_vocab_size}]"
    assert [shape for shape, kind in found if kind == "all-gather"] == [logits]


def test_the_search_for_collectives_finds_them() -> None:
    """A step that gathered a matrix would be seen."""
    mesh = make_mesh(2)
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    matrix = jax.ShapeDtypeStruct((8, 6), "float32", sharding=cut)
    text = jax.jit(lambda x: x * 2, out_shardings=whole).lower(matrix).compile().as_text()
    assert collectives(text) == [("f32[8,6]", "all-gather")]


def test_a_mesh_of_other_devices(on_one_device: dict[str, list[list[int]]]) -> None:
    mesh = make_mesh(2, jax.devices()[4:6])
    options = {"skip_tokenizer_init": True, "dtype": "float32", "page_size": 4, "max_num_seqs": 6}
    options |= {"compilation_cache": False, "progress": False}
    with Engine.from_pretrained(str(CHECKPOINTS / "llama"), mesh=mesh, **(options | SIZES)) as engine:
        assert run(engine, "llama") == on_one_device["llama"]
        runner = engine._core.runner
        arrays = jax.tree.leaves(runner.stages[0].arrays)
        assert {device for array in arrays for device in array.devices()} == set(jax.devices()[4:6])


def test_sleep_keeps_the_cut(on_one_device: dict[str, list[list[int]]]) -> None:
    with small_engine(tensor_parallel_size=4, **SIZES) as engine:
        for level in (1, 2):
            engine.sleep(level)
            engine.wake_up()
            check_shards(engine, 4)
        assert run(engine, "llama") == on_one_device["llama"]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (3, r"num_attention_heads=8: must be a multiple of tensor_parallel_size=3"),
        (5, r"num_attention_heads=8: must be a multiple of tensor_parallel_size=5"),
        (16, "tensor_parallel_size=16"),
    ],
)
def test_what_does_not_divide_is_named(devices: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_engine(tensor_parallel_size=devices, **SIZES)
