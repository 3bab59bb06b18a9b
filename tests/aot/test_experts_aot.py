"""Layers of experts over several chips: how tokens come to them, and that no weight is moved or made anew."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from aot_records import compile_lowered
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.layers.expert_exchange import Exchange, exchange_ragged
from jaxllm.layers.experts import Experts, Gating
from jaxllm.layers.packing import join_layers
from jaxllm.layers.router import Routing
from jaxllm.models.abstract import Parameter
from jaxllm.parallel import DATA_GROUPS, make_mesh, over_groups, partition_spec
from pallas_kernels.targets import Target

pytestmark = pytest.mark.aot


class Sizes(NamedTuple):
    """Of one layer."""

    experts: int
    embed: int
    mlp: int
    chosen: int


MIXTRAL = Sizes(8, 4096, 14336, 2)
QWEN = Sizes(128, 4096, 1536, 8)
"""Mixtral 8x7B and Qwen3-235B-A22B."""
NARROW = QWEN._replace(mlp=QWEN.mlp // 4)
"""What a quarter of 16 chips has: 192 joined columns each, no multiple of a TPU's 128 lanes."""


def lower(
    mesh: Mesh, sizes: Sizes, tokens: int, exchange: Exchange | None = None, *, joined: bool = True
) -> jax.stages.Lowered:
    """The layer's program; not `joined`: with gate and up as checkpoints are read."""
    dtype = jnp.dtype(jnp.bfloat16)

    def shape(dims: tuple[int, ...], kind: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, kind, sharding=NamedSharding(mesh, PartitionSpec()))

    def make() -> Experts:
        experts = Experts(*sizes[:3], gating=Gating(), exchange=exchange, dtype=dtype, rngs=nnx.Rngs(0))
        if joined:
            join_layers(experts)
        return experts

    with jax.set_mesh(mesh):
        graph, state = nnx.split(nnx.eval_shape(make))
        weights = []
        for _, one in nnx.to_flat_state(state):
            about = one.get_metadata()
            packing = about.get("packing")
            before = one.shape if packing is None else packing.shape
            parameter = Parameter(before, dtype, about["axes"], about["initializer"], packing)
            weights.append(parameter.kept(mesh))

        def run(weights: list[jax.Array], x: jax.Array, routing: Routing) -> jax.Array:
            made = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), weights))
            return made(x, routing, jnp.ones(tokens, bool))[0]

        routing = Routing(shape((tokens, sizes.chosen), "int32"), shape((tokens, sizes.chosen), "float32"))
        return jax.jit(run).lower(weights, shape((tokens, sizes.embed), "bfloat16"), routing)


@pytest.mark.parametrize("tokens", [256, 2048], ids=["decode", "prefill"])
@pytest.mark.parametrize(("name", "tensor", "expert"), [("v5e:2x4", 2, 4), ("v6e:2x2", 1, 4)])
def test_experts(name: str, tensor: int, expert: int, tokens: int) -> None:
    """Tokens go to their experts and come back by ragged all-to-all."""
    target = Target.parse(name)
    mesh = make_mesh(tensor, target.devices(), expert_parallel_size=expert)
    result = compile_lowered(target, lower(mesh, MIXTRAL, tokens, exchange_ragged))
    found = result.text.collectives()
    sent = found.pop("ragged-all-to-all")
    assert sent.count == 2
    assert set(found) <= {"all-reduce", "all-gather"}
    # an expert's parts are summed, and all get all tokens; no weight moves
    assert sum(one.nbytes for one in found.values()) <= 3 * tokens * MIXTRAL.embed * 4
    copies = result.text.copies(MIXTRAL.mlp * MIXTRAL.embed * 2 // tensor)
    assert not [one for one in copies if one.result.startswith("bf16")], "a weight is copied"
    shapes = f"Mixtral-8x7B, {tokens} tokens, experts over {expert}, columns over {tensor}"
    result.record(
        "experts", "ragged-all-to-all", mesh.size, shapes, "", "tokens exchanged", "no weight moves"
    )


def remade(target: Target, sizes: Sizes, *, joined: bool) -> list[str]:
    """What makes something of the size of a chip's weights again in the decode step of a layer."""
    mesh = make_mesh(4, target.devices())
    result = compile_lowered(target, lower(mesh, sizes, 256, joined=joined))
    down = sizes.experts * sizes.embed * sizes.mlp * 2 // mesh.size
    text = result.text
    made = [one for one in text.instructions if one.nbytes >= down and one.computation not in text.fused]
    kinds = [one.opcode for one in made if one.opcode not in ("parameter", "bitcast", "tuple")]
    if joined:
        result.record(
            "experts",
            "sum",
            mesh.size,
            f"Qwen3-235B-A22B, 256 tokens, {2 * sizes.mlp // mesh.size} columns of each expert",
            "",
            "no weight is made anew",
        )
    return kinds


@pytest.mark.parametrize(("name", "sizes"), [("v6e:2x2", NARROW), ("h100:4", QWEN)], ids=["tpu", "gpu"])
def test_weights_are_read_as_they_are_kept(name: str, sizes: Sizes) -> None:
    assert remade(Target.parse(name), sizes, joined=True) == []


def test_weights_in_two_parts_are_made_anew() -> None:
    """Which is why they are joined when they are loaded."""
    assert remade(Target.parse("v6e:2x2"), NARROW, joined=False) != []


@pytest.mark.parametrize(
    ("exchange", "wanted"),
    [(exchange_ragged, {"ragged-all-to-all": 2}), (None, {"all-gather": 3, "reduce-scatter": 1})],
    ids=["ragged", "sum"],
)
def test_experts_over_data_groups(exchange: Exchange | None, wanted: dict[str, int]) -> None:
    """Four groups of one chip each: nothing but the tokens goes between them."""
    target = Target.parse("v5e:2x2")
    mesh = make_mesh(1, target.devices(), data_parallel_size=4)
    own, tokens, embed = NamedSharding(mesh, PartitionSpec(DATA_GROUPS)), 256, 512

    def make() -> Experts:
        options = {"gating": Gating(), "exchange": exchange, "dtype": jnp.dtype(jnp.bfloat16)}
        return Experts(MIXTRAL.experts, embed, 2 * embed, **options, rngs=nnx.Rngs(0))

    with jax.set_mesh(mesh):
        graph, state = nnx.split(nnx.eval_shape(make))
        leaves, structure = jax.tree.flatten(state)
        specs = [partition_spec(one.get_metadata()["axes"]) for _, one in nnx.to_flat_state(state)]
        weights = [
            jax.ShapeDtypeStruct(leaf.shape, "bfloat16", sharding=NamedSharding(mesh, spec))
            for leaf, spec in zip(leaves, specs, strict=True)
        ]

        def run(weights: list[jax.Array], x: jax.Array, routing: Routing) -> jax.Array:
            made = nnx.merge(graph, jax.tree.unflatten(structure, weights))
            return made(x, routing, jnp.ones(len(x), bool))[0]

        cut = jax.shard_map(
            run,
            in_specs=([over_groups(spec) for spec in specs], own.spec, own.spec),
            out_specs=own.spec,
            axis_names={DATA_GROUPS},
            check_vma=False,
        )
        x = jax.ShapeDtypeStruct((tokens, embed), "bfloat16", sharding=own)
        chosen, mixed = (
            jax.ShapeDtypeStruct((tokens, MIXTRAL.chosen), kind, sharding=own)
            for kind in ("int32", "float32")
        )
        result = compile_lowered(target, jax.jit(cut).lower(weights, x, Routing(chosen, mixed)))
    found = {kind: one.count for kind, one in result.text.collectives().items()}
    counts = found.pop("all-reduce", 0)  # how many tokens each device sends to each expert
    assert found == wanted
    assert counts == (exchange is not None)
