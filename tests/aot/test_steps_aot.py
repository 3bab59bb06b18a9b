"""Whole steps of the engine, of all layers, compiled from shapes: nothing is allocated."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from aot_records import compile_lowered

from jaxllm.cache.groups import group_layers
from jaxllm.layers.expert_exchange import exchange_ragged
from jaxllm.models import abstract
from jaxllm.models.decoder import Decoder
from jaxllm.models.llama import Llama
from jaxllm.models.mixtral import Mixtral
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
MIXTRAL_8X7B = LLAMA_3_8B | {
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Case:
    """A model on a slice.

    Attributes:
        tensor, expert: devices along the axes of the mesh. Experts are exchanged, as on TPU by default.
    """

    model: str
    target: str
    tensor: int = 1
    expert: int = 1

    def __str__(self) -> str:
        return f"{self.model}-{self.target}"


MODELS: dict[str, tuple[type[Decoder], dict[str, Any]]] = {
    "Llama-3-8B": (Llama, LLAMA_3_8B),
    "Mixtral-8x7B": (Mixtral, MIXTRAL_8X7B),
}
CASES = [
    Case("Llama-3-8B", "v5e:2x4", tensor=8),
    Case("Llama-3-8B", "v6e:2x2", tensor=4),
    Case("Llama-3-8B", "h100"),
    Case("Mixtral-8x7B", "v5e:2x4", tensor=2, expert=4),
    Case("Mixtral-8x7B", "v6e:2x2", expert=4),
]


@cache
def make_lowering(case: Case) -> tuple[Target, Lowering]:
    """The engine's programs as it would size them there."""
    target = Target.parse(case.target)
    mesh = make_mesh(case.tensor, target.devices(), expert_parallel_size=case.expert)
    dtype = jnp.dtype(jnp.bfloat16)
    model, hf = MODELS[case.model]
    config = model.read_config(hf, dtype=dtype, tensor_parallel_size=case.tensor)
    config = replace(config, expert_parallel_size=case.expert)
    if config.mixture is not None:
        config = replace(config, mixture=replace(config.mixture, exchange=exchange_ragged))
    with jax.set_mesh(mesh):
        structure, parameters = abstract.split(model, config)
    params = tuple(
        jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=one.sharding(mesh)) for one in parameters.values()
    )
    chip, shares = target.chip, config.devices_per_layer
    local = PageGeometry(1, 16, config.cache_heads // shares, config.head_dim, dtype)
    problem = Problem(chip.platform, chip.device_kind, config.num_heads // shares, local, dtype)
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
def plan(case: Case) -> tuple[MemoryUse, int]:
    """The engine's memory plan, and the pages that fill what it leaves."""
    target, lowering = make_lowering(case)
    use = measure(lowering)
    budget = int(target.chip.usable_hbm * DEFAULT_UTILIZATION) - use.total
    return use, budget // page_bytes(lowering)


@pytest.mark.parametrize("tokens", [256, 2048], ids=["decode", "prefill"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case: Case, tokens: int) -> None:
    target, lowering = make_lowering(case)
    use, num_pages = plan(case)
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
    assert counts == expected_collectives(case, layers)
    kind = "prefill" if tokens == 2048 else "decode"
    shape = f"{case.model}, {kind}, {tokens} tokens, {num_pages} pages of 16"
    result.record("step", lowering.backend.name, lowering.mesh.size, shape, "bfloat16", *checked)


def expected_collectives(case: Case, layers: int) -> dict[str, int]:
    """A sum for the embedding and two a layer, and a gather of logits.

    With experts that are exchanged, a layer's second sum is that of an expert's parts, if it has any; rows go
    and come back, after the devices have told each other how many, and then all get all of them.
    """
    if case.tensor * case.expert == 1:
        return {}
    if case.expert == 1:
        return {"all-reduce": 1 + 2 * layers, "all-gather": 1}
    sums = 2 if case.tensor > 1 else 1
    return {"all-reduce": 1 + sums * layers, "ragged-all-to-all": 2 * layers, "all-gather": 1 + 2 * layers}
