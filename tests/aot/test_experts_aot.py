"""Experts of Mixtral 8x7B over several chips: tokens go to them and come back by ragged all-to-all."""

import jax
import jax.numpy as jnp
import pytest
from aot_records import compile_lowered
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.layers.expert_exchange import Exchange, exchange_ragged
from jaxllm.layers.experts import Experts, Gating
from jaxllm.layers.router import Routing
from jaxllm.parallel import DATA_GROUPS, make_mesh, over_groups, partition_spec
from pallas_kernels.targets import Target

pytestmark = pytest.mark.aot
EXPERTS, EMBED, MLP, CHOSEN = 8, 4096, 14336, 2


@pytest.mark.parametrize("tokens", [256, 2048], ids=["decode", "prefill"])
@pytest.mark.parametrize(("name", "tensor", "expert"), [("v5e:2x4", 2, 4), ("v6e:2x2", 1, 4)])
def test_experts(name: str, tensor: int, expert: int, tokens: int) -> None:
    target = Target.parse(name)
    mesh = make_mesh(tensor, target.devices(), expert_parallel_size=expert)
    dtype = jnp.dtype(jnp.bfloat16)

    def shape(sizes: tuple[int, ...], kind: str, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, kind, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        experts = nnx.eval_shape(
            lambda: Experts(
                EXPERTS, EMBED, MLP, gating=Gating(), exchange=exchange_ragged, dtype=dtype, rngs=nnx.Rngs(0)
            )
        )
        graph, state = nnx.split(experts)
        weights = [
            shape(one.shape, "bfloat16", partition_spec(one.get_metadata()["axes"]))
            for _, one in nnx.to_flat_state(state)
        ]

        def run(weights: list[jax.Array], x: jax.Array, routing: Routing) -> jax.Array:
            made = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), weights))
            return made(x, routing, jnp.ones(tokens, bool))[0]

        whole = PartitionSpec()
        routing = Routing(shape((tokens, CHOSEN), "int32", whole), shape((tokens, CHOSEN), "float32", whole))
        lowered = jax.jit(run).lower(weights, shape((tokens, EMBED), "bfloat16", whole), routing)
    result = compile_lowered(target, lowered)
    found = result.text.collectives()
    sent = found.pop("ragged-all-to-all")
    assert sent.count == 2
    assert set(found) <= {"all-reduce", "all-gather"}
    # an expert's parts are summed, and all get all tokens; no weight moves
    assert sum(one.nbytes for one in found.values()) <= 3 * tokens * EMBED * 4
    copies = result.text.copies(MLP * EMBED * 2 // tensor)
    assert not [one for one in copies if one.result.startswith("bf16")], "a weight is copied"
    shapes = f"Mixtral-8x7B, {tokens} tokens, experts over {expert}, columns over {tensor}"
    result.record(
        "experts", "ragged-all-to-all", mesh.size, shapes, "", "tokens exchanged", "no weight moves"
    )


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
        return Experts(EXPERTS, embed, 2 * embed, **options, rngs=nnx.Rngs(0))

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
            jax.ShapeDtypeStruct((tokens, CHOSEN), kind, sharding=own) for kind in ("int32", "float32")
        )
        result = compile_lowered(target, jax.jit(cut).lower(weights, x, Routing(chosen, mixed)))
    found = {kind: one.count for kind, one in result.text.collectives().items()}
    counts = found.pop("all-reduce", 0)  # how many tokens each device sends to each expert
    assert found == wanted
    assert counts == (exchange is not None)
