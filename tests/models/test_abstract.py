"""Models as flat tuples of arrays."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, GOLDENS
from paged_harness import PagedRunner
from safetensors.numpy import load_file

from jaxllm.models import CausalLM, DecoderConfig, ModelRegistry, materialize, merge, split
from jaxllm.parallel import make_mesh


def load(name: str, **options: Any) -> tuple[type[CausalLM], DecoderConfig]:
    hf = json.loads((GOLDENS / name / "config.json").read_text())
    model = ModelRegistry.resolve(hf)
    return model, model.read_config(hf, **({"dtype": "float32", "tensor_parallel_size": 1} | options))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.weights is None])
def test_merge_puts_each_array_at_its_path(name: str) -> None:
    structure, parameters = split(*load(name))
    leaves = [jnp.full(parameter.shape, n) for n, parameter in enumerate(parameters.values())]
    for n, path in enumerate(parameters):
        found: Any = merge(structure, leaves)
        for part in path.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        assert found[...].ravel()[0] == n


def test_order_is_that_of_layers_by_number() -> None:
    model, config = load("llama")
    many = json.loads((GOLDENS / "llama" / "config.json").read_text()) | {"num_hidden_layers": 11}
    config = model.read_config(many, dtype="float32", tensor_parallel_size=1)
    layers = [int(path.split(".")[1]) for path in split(model, config)[1] if path.startswith("layers")]
    assert layers == sorted(layers)


def test_random_weights_are_made_in_their_shards() -> None:
    model, config = load("gemma2", tensor_parallel_size=4, dtype="bfloat16")
    mesh = make_mesh(4)
    _, parameters = split(model, config)
    arrays = materialize(parameters, mesh, seed=3)
    for array, parameter in zip(arrays, parameters.values(), strict=True):
        assert (array.shape, array.dtype) == (parameter.shape, parameter.dtype)
        assert array.sharding == parameter.sharding(mesh)
        assert array.nbytes == parameter.nbytes
    same = materialize(parameters, make_mesh(1), seed=3)
    other = materialize(parameters, mesh, seed=4)
    random = next(n for n, path in enumerate(parameters) if path.endswith("qkv.weight"))
    np.testing.assert_array_equal(np.asarray(arrays[random]), np.asarray(same[random]))
    assert np.any(np.asarray(arrays[random]) != np.asarray(other[random]))
    made = np.concatenate([np.asarray(a, np.float32).ravel() for a in arrays if a.ndim > 1])
    assert made.std() == pytest.approx(0.02, rel=0.02)
    assert abs(made.mean()) < 1e-3
    assert len(np.unique(np.asarray(arrays[random], np.float32))) > 1000


def test_split_makes_no_arrays() -> None:
    before = len(jax.live_arrays())
    model, config = load("llama")
    split(model, config)
    assert len(jax.live_arrays()) == before


def test_step_keeps_two_byte_weights_as_they_are() -> None:
    """XLA on CPU likes to turn whole bfloat16 tables into float32, which would take most of a step's time."""
    model, config = load("gemma2", dtype="bfloat16")
    runner = PagedRunner(model, config, load_file(GOLDENS / "gemma2" / "model.safetensors"))
    tokens, batch = runner.inputs({0: [1], 1: [2]})
    with jax.set_mesh(runner.mesh):
        text = runner.run.lower(runner.weights, runner.cache, tokens, batch).compile().as_text()
    assert text is not None
    rows, embed, heads, head_dim = config.vocab_size, config.hidden_size, config.num_heads, config.head_dim
    for shape in ((rows, embed), (embed, rows), (heads * head_dim, embed), (config.intermediate_size, embed)):
        assert f"f32[{shape[0]},{shape[1]}]" not in text
