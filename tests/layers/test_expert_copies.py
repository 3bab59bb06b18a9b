"""Experts with copies: the sums of experts without, tokens in turns, and weights that move whole."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from test_experts import EXPERTS, Sizes, choose, exchange_padded, expect, make, run, tokens

from jaxllm.layers.expert_copies import Copies, ExpertCopies, gather_slots
from jaxllm.layers.expert_exchange import Exchange
from jaxllm.layers.experts import GATE_UP, Experts, Gating
from jaxllm.layers.router import Routing
from jaxllm.parallel import make_mesh, partition_spec
from jaxllm.parallel.placement import Placement

HOT = np.array([50.0, 1.0, 1.0, 30.0, 2.0, 2.0])


def copied(experts: Experts, placement: Placement, copies: Copies, exchange: Exchange | None) -> Experts:
    """The same experts in the slots of a placement."""
    options = {"gating": experts.gating, "bias": experts.gate_up.bias is not None, "exchange": exchange}
    embed, mlp = experts.gate_up.weight.shape[1], experts.down.weight.shape[1]
    made = Experts(
        EXPERTS, embed, mlp, **options, copies=copies, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)
    )
    for to, like in ((made.gate_up, experts.gate_up), (made.down, experts.down)):
        to.weight[...] = like.weight[...][placement.experts[0]]
        if to.bias is not None and like.bias is not None:
            to.bias[...] = like.bias[...][placement.experts[0]]
    assert made.copies is not None
    made.copies.table[...] = jnp.asarray(placement.tables(copies.most)[0])
    return made


@pytest.mark.parametrize(
    ("sizes", "redundant", "exchange", "groups"),
    [
        ((2, 3), 3, None, 1),
        ((1, 6), 12, exchange_padded, 1),
        ((1, 3), 6, exchange_padded, 2),
    ],
)
def test_sums_are_those_of_experts_without_copies(
    sizes: Sizes, redundant: int, exchange: Exchange | None, groups: int
) -> None:
    """`run` holds the load to the routing's; 7 of the tokens are not there."""
    gating = Gating(limit=0.8, alpha=1.7)
    experts, x = make(bias=True, gating=gating), tokens()
    copies = Copies(EXPERTS, redundant, groups * sizes[1])
    placed = copied(experts, copies.even(1).rebalanced(0, HOT), copies, exchange)
    one = Routing(jnp.full((len(x), 1), 3, jnp.int32), jnp.ones((len(x), 1), jnp.float32))
    for routing in (choose(), one):
        out = run(placed, x.at[33:].set(jnp.nan), routing, used=33, sizes=sizes, groups=groups)
        np.testing.assert_allclose(out[:33], expect(experts, x, routing, gating)[:33], atol=1e-5)
        np.testing.assert_array_equal(out[33:], 0.0)


def test_tokens_take_turns() -> None:
    """In the order of the batch, each expert's by themselves; those that are not there take no turn."""
    with jax.set_mesh(make_mesh(1)):
        copies = ExpertCopies(Copies(4, 4, 4), rngs=nnx.Rngs(0))
    copies.table[...] = jnp.array([[0, 2, 5, -1], [4, 6, -1, -1], [1, 3, -1, -1], [7, -1, -1, -1]])
    experts = jnp.array([[0, 1], [0, 2], [0, 3], [1, 0], [0, 1], [3, 1]])
    slots = copies(experts, jnp.array([True, True, False, True, True, True]))
    assert slots[0].tolist() == [0, 6]
    assert slots[1].tolist() == [2, 1]
    assert slots[3].tolist() == [4, 5]
    assert slots[4].tolist() == [0, 6]
    assert slots[5].tolist() == [7, 4]
    turned = copies(experts, jnp.array([True, True, False, True, True, True]), 1)
    assert turned[:2].tolist() == [[2, 4], [5, 3]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tensor", "expert", "data"), [(1, 8, 1), (4, 2, 1), (2, 2, 2)])
def test_weights_move_whole(tensor: int, expert: int, data: int, dtype: str) -> None:
    """From the checkpoint's order into slots, and on; with room for one array's part, and an expert more."""
    mesh, devices = make_mesh(tensor, expert_parallel_size=expert, data_parallel_size=data), data * expert
    sharding = NamedSharding(mesh, partition_spec(GATE_UP))
    weight = np.random.default_rng(0).normal(size=(8, 64, 2, 32)).astype(dtype)
    copies = Copies(8, 8, devices)
    places = [Placement.plain(1, 8, devices), copies.even(1)]
    places.append(places[-1].rebalanced(0, np.array([9.0, 1, 1, 1, 7, 1, 1, 1])))
    gather = jax.jit(lambda weight, source: gather_slots(weight, source, sharding=sharding))
    held = jax.device_put(weight, sharding)
    for before, after in itertools.pairwise(places):
        source = after.sources(before, 0)
        part = after.experts.shape[1] // devices * weight[0].nbytes // tensor
        if dtype == "float32":  # XLA on CPU adds in no other
            analysis = gather.lower(held, source).compile().memory_analysis()
            assert analysis is not None
            assert analysis.temp_size_in_bytes < part + 4 * weight[0].nbytes // tensor + 1000
        held = gather(held, source)
        assert held.sharding == sharding
        np.testing.assert_array_equal(held, weight[after.experts[0]])
