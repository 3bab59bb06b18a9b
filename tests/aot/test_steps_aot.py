"""Whole steps of the engine, all layers of Llama-3-8B, compiled from shapes: nothing is allocated."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from aot_records import compile_lowered

from jaxllm.cache.groups import group_layers
from jaxllm.models import abstract
from jaxllm.models.llama import Llama
from jaxllm.parallel import make_mesh
from jaxllm.runner.lowering import Lowering, Sizes
from jaxllm.runner.memory import DEFAULT_UTILIZATION, MemoryUse, bytes_per_device, measure, page_bytes
from jaxllm.sampling.state import SamplerConfig
from pallas_kernels.paged_attention import PageGeometry, Problem, choose_backend
from pallas_kernels.targets import Target

pytestmark = pytest.mark.aot
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
TARGETS = {"v5e:2x4": 8, "v6e:2x2": 4, "h100": 1}
"""Tensor parallel sizes."""


@cache
def make_lowering(name: str) -> tuple[Target, Lowering]:
    """The engine's programs as it would size them there."""
    target, tensor_parallel = Target.parse(name), TARGETS[name]
    mesh = make_mesh(tensor_parallel, target.devices())
    dtype = jnp.dtype(jnp.bfloat16)
    config = Llama.read_config(LLAMA_3_8B, dtype=dtype, tensor_parallel_size=tensor_parallel)
    with jax.set_mesh(mesh):
        structure, parameters = abstract.split(Llama, config)
    params = tuple(
        jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=one.sharding(mesh)) for one in parameters.values()
    )
    local = PageGeometry(1, 16, config.cache_heads // tensor_parallel, config.head_dim, dtype)
    chip = target.chip
    problem = Problem(chip.platform, chip.device_kind, config.num_heads // tensor_parallel, local, dtype)
    sizes = Sizes(
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        max_model_len=8192,
        page_size=16,
        bucket_growth=2,
        num_logprobs=20,
    )
    return target, Lowering(
        config,
        partial(abstract.merge, structure),
        params,
        mesh,
        group_layers(config.layer_windows),
        sizes,
        SamplerConfig(config.vocab_size),
        choose_backend("auto", [problem]).backend,
    )


@cache
def plan(name: str) -> tuple[MemoryUse, int]:
    """The engine's memory plan, and the pages that fill what it leaves."""
    target, lowering = make_lowering(name)
    use = measure(lowering)
    budget = int(target.chip.usable_hbm * DEFAULT_UTILIZATION) - use.total
    return use, budget // page_bytes(lowering)


@pytest.mark.parametrize("tokens", [256, 2048], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", TARGETS)
def test_step(name: str, tokens: int) -> None:
    target, lowering = make_lowering(name)
    use, num_pages = plan(name)
    bucket = lowering.buckets.fit(tokens)
    result = compile_lowered(target, lowering.forward(bucket, num_pages))
    pages = num_pages * page_bytes(lowering)
    layers = lowering.model.num_layers

    memory = result.memory
    assert memory.alias_size_in_bytes >= pages
    assert bytes_per_device(lowering.params) == use.weights
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    checked = ["pages aliased", "collectives", "fits in the chip's memory"]
    assert use.total + pages <= target.chip.usable_hbm
    assert memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes <= target.chip.usable_hbm
    if (lowering.backend.name, target.chip.platform) != ("xla", "tpu"):
        # on TPU the fallback's scatter takes a second pool, which a plan made with few pages does not see
        assert not result.text.copies(pages // layers), "a pool is copied"
        assert memory.temp_size_in_bytes + 2 * outputs <= 1.02 * use.temporaries
        checked += ["no copy of a pool", "temporaries as planned"]

    counts = {kind: traffic.count for kind, traffic in result.text.collectives().items()}
    one_chip = lowering.mesh.size == 1
    assert counts == ({} if one_chip else {"all-reduce": 1 + 2 * layers, "all-gather": 1})
    kind = "prefill" if tokens == 2048 else "decode"
    shape = f"Llama-3-8B, {kind}, {tokens} tokens, {num_pages} pages of 16"
    result.record("step", lowering.backend.name, lowering.mesh.size, shape, "bfloat16", *checked)
