"""Experts against a product with every expert for every token, and what a token may not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from jaxllm.layers import packing as packing_module
from jaxllm.layers.expert_exchange import AXIS, Exchange
from jaxllm.layers.experts import Experts, Gating
from jaxllm.layers.packing import Joined, join_layers, pack_layers
from jaxllm.layers.router import Routing
from jaxllm.parallel import DATA_GROUPS, make_mesh, over_groups, partition_spec
from pallas_kernels.packed_matmul import as_backend

EXPERTS, EMBED, MLP, CHOSEN, TOKENS = 6, 32, 24, 2, 40
Sizes = tuple[int, int]
"""Devices along the axes tensor and expert."""


def make(
    *,
    bias: bool = False,
    gating: Gating = Gating(),  # noqa: B008
    exchange: Exchange | None = None,
    dtype: str = "float32",
) -> Experts:
    """Experts with random weights of a size at which all of them matter."""
    options = {"gating": gating, "bias": bias, "exchange": exchange}
    experts = Experts(EXPERTS, EMBED, MLP, **options, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    for layer, fan_in in ((experts.gate_up, EMBED), (experts.down, MLP)):
        weight = random.normal(size=layer.weight.shape) * fan_in**-0.5
        layer.weight[...] = jnp.asarray(weight, dtype)
        if layer.bias is not None:
            layer.bias[...] = jnp.asarray(random.normal(size=layer.bias.shape), dtype)
    return experts


def tokens(dtype: str = "float32") -> Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(TOKENS, EMBED)), dtype)


def choose(seed: int = 2) -> Routing:
    random = np.random.default_rng(seed)
    chosen = np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in range(TOKENS)])
    return Routing(jnp.asarray(chosen, jnp.int32), jnp.asarray(random.random(chosen.shape), jnp.float32))


def run(
    experts: Experts,
    x: Array,
    routing: Routing,
    used: int = TOKENS,
    sizes: Sizes = (1, 1),
    groups: int = 1,
) -> Array:
    """The layer in a program, its weights cut over devices, and the tokens over data groups."""
    tensor, expert = sizes
    mesh = make_mesh(tensor, expert_parallel_size=expert, data_parallel_size=groups)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(experts)

        def place(param: nnx.Param[Array]) -> nnx.Variable[Array]:
            about = param.get_metadata()
            packing = about.get("packing")
            axes = packing.kept_axes if isinstance(packing, Joined) else about["axes"]
            sharding = jax.sharding.NamedSharding(mesh, partition_spec(axes))
            return param.replace(jax.device_put(param[...], sharding))

        state = jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))

        def call(state: nnx.State, x: Array, routing: Routing, used: Array) -> tuple[Array, Array]:
            return nnx.merge(graph, state)(x, routing, used)

        if groups > 1:
            own = jax.sharding.PartitionSpec(DATA_GROUPS)
            cut = jax.tree.map(lambda array: over_groups(array.sharding.spec), state)
            specs = {"in_specs": (cut, own, own, own), "out_specs": own}
            call = jax.shard_map(call, **specs, axis_names={DATA_GROUPS}, check_vma=False)
        out, load = jax.jit(call)(state, x, routing, jnp.arange(TOKENS) < used)
    expected = np.bincount(np.asarray(routing.experts)[:used].ravel(), minlength=EXPERTS)
    if experts.copies is not None:
        load = of_experts(experts, load, groups)
    np.testing.assert_array_equal(load, expected)
    return out


def of_experts(experts: Experts, load: Array, groups: int) -> np.ndarray:
    """Tokens of each expert, whose copies have nearly equal shares of those of each data group."""
    assert experts.copies is not None
    tokens = [np.asarray(load)[own[own >= 0]] for own in np.asarray(experts.copies.table[...])]
    assert all(np.ptp(own) <= groups for own in tokens)
    return np.array([own.sum() for own in tokens])


def expect(experts: Experts, x: Array, routing: Routing, gating: Gating) -> np.ndarray:
    """Every expert for every token, weighted with zero where it was not chosen."""
    gate_up, down = experts.gate_up, experts.down
    hidden = np.einsum("te,xeum->txum", x, gate_up.weight[...])
    if gate_up.bias is not None:
        hidden += np.asarray(gate_up.bias[...])
    hidden = gating(jnp.asarray(hidden[:, :, 0]), jnp.asarray(hidden[:, :, 1]))
    out = np.einsum("txm,xme->txe", hidden, down.weight[...])
    if down.bias is not None:
        out += np.asarray(down.bias[...])
    weights = np.zeros((TOKENS, EXPERTS))
    np.put_along_axis(weights, np.asarray(routing.experts), np.asarray(routing.weights), axis=1)
    return np.einsum("tx,txe->te", weights, out)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (8, 1), (1, 6), (4, 2)])
def test_equals_all_experts_for_all_tokens(sizes: Sizes, biased: bool) -> None:
    gating = Gating(limit=0.8, alpha=1.7) if biased else Gating()
    experts, x, routing = make(bias=biased, gating=gating), tokens(), choose()
    out = run(experts, x, routing, sizes=sizes)
    np.testing.assert_allclose(out, expect(experts, x, routing, gating), atol=1e-5)


def exchange_padded(rows: Array, sizes: Array, capacity: int) -> Array:
    """What `exchange_ragged` does, of parts that are padded to what any could be: XLA on CPU has that one."""
    me, count = jax.lax.axis_index(AXIS), len(rows)
    send, arriving = sizes[me], sizes[:, me]
    index = (jnp.cumsum(send) - send)[:, None] + jnp.arange(count)
    parts = jnp.where(
        (jnp.arange(count) < send[:, None])[..., None], rows.at[index].get(mode="clip"), jnp.nan
    )
    parts = jax.lax.all_to_all(parts, AXIS, 0, 0)
    device = jnp.searchsorted(jnp.cumsum(arriving), jnp.arange(capacity), side="right")
    place = jnp.arange(capacity) - (jnp.cumsum(arriving) - arriving).at[device].get(mode="clip")
    found = parts.at[device, place].get(mode="clip")
    return jnp.where((device < len(sizes))[:, None], found, 0.0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [(1, 2), (1, 6), (4, 2)])
def test_tokens_come_to_their_experts_and_back(sizes: Sizes, biased: bool) -> None:
    """Each device begins with a share of the tokens; 40 are no multiple of 6, and some are not used."""
    gating = Gating(limit=0.8, alpha=1.7) if biased else Gating()
    experts, x, routing = make(bias=biased, gating=gating, exchange=exchange_padded), tokens(), choose()
    expected = expect(experts, x, routing, gating)
    np.testing.assert_allclose(run(experts, x, routing, sizes=sizes), expected, atol=1e-5)
    part = run(experts, x.at[33:].set(jnp.nan), routing, used=33, sizes=sizes)
    np.testing.assert_allclose(part[:33], expected[:33], atol=1e-5)
    np.testing.assert_array_equal(part[33:], 0.0)
    routing = Routing(jnp.full((TOKENS, 1), 3, jnp.int32), jnp.ones((TOKENS, 1), jnp.float32))
    out = run(experts, x, routing, sizes=sizes)
    np.testing.assert_allclose(out, expect(experts, x, routing, gating), atol=1e-5)


@pytest.mark.parametrize(("sizes", "exchange"), [((4, 1), None), ((1, 3), None), ((1, 3), exchange_padded)])
def test_tokens_of_all_data_groups_come_to_the_experts(sizes: Sizes, exchange: Exchange | None) -> None:
    """Each group has half of the tokens and of the experts; 20 are no multiple of 3."""
    gating = Gating(limit=0.8, alpha=1.7)
    experts, x, routing = make(bias=True, gating=gating, exchange=exchange), tokens(), choose()
    expected = expect(experts, x, routing, gating)
    np.testing.assert_allclose(run(experts, x, routing, sizes=sizes, groups=2), expected, atol=1e-5)
    part = run(experts, x.at[17:].set(jnp.nan), routing, used=17, sizes=sizes, groups=2)
    np.testing.assert_allclose(part[:17], expected[:17], atol=1e-5)
    np.testing.assert_array_equal(part[17:], 0.0)


def test_no_token_is_dropped_where_all_go_to_one_expert() -> None:
    experts, x = make(), tokens()
    routing = Routing(jnp.full((TOKENS, 1), 3, jnp.int32), jnp.ones((TOKENS, 1), jnp.float32))
    np.testing.assert_allclose(run(experts, x, routing), expect(experts, x, routing, Gating()), atol=1e-5)


def test_token_does_not_depend_on_its_company() -> None:
    """The same bits, whoever else is in the step and whichever experts they keep busy."""
    experts, x, routing = make(), tokens(), choose()
    out = run(experts, x, routing)
    others = choose(3)
    for place in (0, 17, 39):
        changed = Routing(
            others.experts.at[place].set(routing.experts[place]),
            others.weights.at[place].set(routing.weights[place]),
        )
        again = run(experts, (5.0 * x).at[place].set(x[place]), changed)
        np.testing.assert_array_equal(again[place], out[place])


def test_padding_costs_nothing_and_changes_nothing() -> None:
    """Tokens that are not used go to no expert, even if they are full of NaN."""
    experts, x, routing = make(bias=True), tokens(), choose()
    out = run(experts, x, routing)
    part = run(experts, x.at[9:].set(jnp.nan), routing, used=9)
    np.testing.assert_array_equal(part[:9], out[:9])
    np.testing.assert_array_equal(part[9:], 0.0)


def test_bfloat16_weights_are_kept_as_bits_on_cpu() -> None:
    experts, x, routing = make(dtype="bfloat16"), tokens("bfloat16"), choose()
    plain = run(experts, x, routing)
    pack_layers(experts, as_backend("cpu"))
    assert experts.gate_up.weight[...].dtype == jnp.uint16
    np.testing.assert_array_equal(run(experts, x, routing), plain)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gate_and_up_side_by_side(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On each device its own columns, which for TPUs fill whole tiles."""
    monkeypatch.setattr(packing_module, "current_device", lambda: (platform, ""))
    experts, x, routing = make(), tokens(), choose()
    plain = run(experts, x, routing, sizes=(4, 2))
    with jax.set_mesh(make_mesh(4, expert_parallel_size=2)):
        join_layers(experts)
    assert experts.gate_up.weight.shape == (EXPERTS, EMBED, 4 * 128 if platform == "tpu" else 2 * MLP)
    np.testing.assert_allclose(run(experts, x, routing, sizes=(4, 2)), plain, atol=1e-5)
