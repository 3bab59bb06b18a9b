"""Feed-forward layers of many experts, of which each token goes through a few."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, Shaped

from jaxllm.layers.expert_copies import Copies, ExpertCopies
from jaxllm.layers.expert_exchange import AXIS, Exchange, exchange_experts
from jaxllm.layers.expert_rows import add_rows, count_rows, sort_rows
from jaxllm.layers.mlp import find_activation
from jaxllm.layers.packing import Joined, Packable, join_parts, keep_as_bits
from jaxllm.layers.parameter import parameter, zeros
from jaxllm.layers.router import Routing
from jaxllm.parallel import DATA_GROUPS, EVERY_DEVICE, Axes, partition_spec, share_over, within_group
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.packed_matmul import Backend

GATE_UP = ("experts", "embed", None, "expert_mlp")
DOWN = ("experts", "expert_mlp", "embed")
"""Logical axes of the weights."""


@dataclass(frozen=True)
class Gating:
    """What is made of an expert's gate and up: `activation(gate) * up`, or gpt-oss's variant of SwiGLU.

    Attributes:
        activation: by Hugging Face's name.
        limit: gates are cut off above it, ups on both sides; None: none are.
        alpha: the gate's slope: `gate * sigmoid(alpha * gate)` in place of the activation, and the up is
            raised by one; None: neither.
    """

    activation: str = "silu"
    limit: float | None = None
    alpha: float | None = None

    def __call__(self, gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        if self.alpha is not None:
            return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1.0)
        return find_activation(self.activation)(gate) * up


class ExpertLinear(Packable):
    """Linear layers of all experts in one weight `[experts, inputs, *outputs]`, and one bias."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.weight = parameter(shape, axes, dtype, rngs)
        without_inputs = (shape[0], *shape[2:]), (axes[0], *axes[2:])
        self.bias = parameter(*without_inputs, dtype, rngs, zeros) if bias else None

    def pack(self, backend: Backend) -> None:
        """Keeps a weight of bfloat16 as its bits: see `grouped_matmul`."""
        if self.weight.dtype == jnp.bfloat16:
            self.weight = keep_as_bits(self.weight)

    def join(self) -> None:
        """Joins gate and up, which are one product."""
        if len(self.weight.shape) > 3:
            self.weight = join_parts(self.weight)

    @property
    def axes(self) -> Axes:
        """Logical axes of the weight as it is kept."""
        about = self.weight.get_metadata()
        packing = about.get("packing")
        return packing.kept_axes if isinstance(packing, Joined) else about["axes"]


class Experts(nnx.Module):
    """`sum of weight * down(gating(gate(x), up(x)))` over each token's experts; no token is left out.

    Tokens are sorted by expert, so that the work is that of the experts they go to: as many rows as there are
    tokens times experts of each, however they are spread. Rows of a batch do not see each other.

    Args:
        experts, embed, mlp: sizes; `mlp` of one expert.
        bias: whether the products have biases.
        exchange: how tokens come to the devices of their experts; None: every device has all tokens.
        copies: of weights; None: each expert's are there once, in order.
    """

    def __init__(
        self,
        experts: int,
        embed: int,
        mlp: int,
        *,
        gating: Gating,
        bias: bool = False,
        exchange: Exchange | None = None,
        copies: Copies | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"bias": bias, "dtype": dtype, "rngs": rngs}
        slots = experts if copies is None else copies.slots
        self.gate_up = ExpertLinear((slots, embed, 2, mlp), GATE_UP, **options)
        self.down = ExpertLinear((slots, mlp, embed), DOWN, **options)
        self.copies = None if copies is None else ExpertCopies(copies, rngs=rngs)
        self.gating = gating
        self.exchange = exchange

    def __call__(
        self,
        x: Float[Array, "tokens embed"],
        routing: Routing,
        used: Bool[Array, " tokens"],
        turn: Int32[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "tokens embed"], Int32[Array, " slots"]]:
        """Each token through its experts.

        Args:
            used: which tokens there are; others go to no expert, and come out as zeros.
            turn: of copies, to be another at the next step; see `ExpertCopies`.

        Returns:
            The sums in float32, and how many tokens went to each expert, or to each of its copies.
        """
        mesh = jax.sharding.get_abstract_mesh()
        groups = mesh.shape[DATA_GROUPS]
        slots = self.gate_up.weight.shape[0] * groups  # the weight is the group's part
        if groups > 1:  # else an expert's first token in each group would go to the same copy
            turn += jax.lax.axis_index(DATA_GROUPS)
        chosen = routing.experts if self.copies is None else self.copies(routing.experts, used, turn)
        chosen = jnp.where(used[:, None], chosen, slots)
        weights = jnp.where(used[:, None], routing.weights, 0.0)
        gate_up, down = self.gate_up, self.down
        bias = None if gate_up.bias is None or down.bias is None else (gate_up.bias[...], down.bias[...])
        run = sharded_experts(mesh, self.gating, gate_up.axes, bias is not None, self.exchange)
        if self.exchange is None:
            return run(x, chosen, weights, gate_up.weight[...], down.weight[...], bias)
        spare = ((0, -len(x) % mesh.shape["expert"]), (0, 0))
        tokens = jnp.pad(x, spare), jnp.pad(chosen, spare, constant_values=slots), jnp.pad(weights, spare)
        out, load = run(*tokens, gate_up.weight[...], down.weight[...], bias)
        return jax.lax.with_sharding_constraint(out, PartitionSpec())[: len(x)], load


@functools.cache
def sharded_experts(
    mesh: AbstractMesh, gating: Gating, gate_up_axes: Axes, bias: bool, exchange: Exchange | None
) -> Callable[..., tuple[Array, Array]]:
    """`apply_experts` over the mesh. Layers that are alike share one function, so that it is traced once.

    As attention leaves them, every device has all tokens of its data group. So each adds up what its own
    experts make of them and of the other groups', and one sum, with which any layer ends, brings the parts
    together; or, with an exchange, each takes a share of the tokens and sends it where its experts are.
    """

    groups = mesh.shape[DATA_GROUPS]

    def spec(*axes: str | None) -> PartitionSpec:
        return within_group(partition_spec(axes)) if groups > 1 else partition_spec(axes)

    whole, shares = PartitionSpec(), spec("experts")
    biases = spec("experts", None, "expert_mlp"), spec("experts", "embed")

    def part(
        x: Array, chosen: Array, weights: Array, gate_up: Array, down: Array, bias: tuple[Array, Array] | None
    ) -> tuple[Array, Array]:
        if bias is not None:  # each device of an expert has a part of what the second bias is added to
            bias = bias[0], jnp.where(jax.lax.axis_index("tensor") == 0, bias[1], 0)
        apply = functools.partial(apply_experts, gate_up=gate_up, down=down, bias=bias, gating=gating)
        if exchange is not None:
            out, load = exchange_experts(x, chosen, weights, len(gate_up), apply, exchange)
            return jax.lax.psum(out, "tensor"), load
        if groups > 1:
            x, chosen, weights = jax.lax.all_gather((x, chosen, weights), DATA_GROUPS, tiled=True)
        local = chosen - jax.lax.axis_index(AXIS) * len(gate_up)
        mine = (local >= 0) & (local < len(gate_up))
        out, load = apply(x, jnp.where(mine, local, len(gate_up)), jnp.where(mine, weights, 0.0))
        if groups == 1:
            return jax.lax.psum(out, (DATA_GROUPS, *EVERY_DEVICE)), load
        out = jax.lax.psum_scatter(out, DATA_GROUPS, tiled=True)  # first, so that less is left to add up
        return jax.lax.psum(out, EVERY_DEVICE), load

    tokens = whole if exchange is None else shares
    return share_over(
        mesh,
        part,
        in_specs=(*[tokens] * 3, spec(*gate_up_axes), spec(*DOWN), biases if bias else None),
        out_specs=(tokens, shares),
    )


@jax.named_scope("experts")
def apply_experts(
    x: Float[Array, "tokens embed"],
    chosen: Int32[Array, "tokens chosen"],
    weights: Float[Array, "tokens chosen"],
    gate_up: Shaped[Array, "experts embed 2 mlp"] | Shaped[Array, "experts embed joined"],
    down: Shaped[Array, "experts mlp embed"],
    bias: tuple[Float[Array, "experts 2 mlp"], Float[Array, "experts embed"]] | None,
    *,
    gating: Gating,
) -> tuple[Float[Array, "tokens embed"], Int32[Array, " experts"]]:
    """What a device's part of the experts adds to each token, in float32, and tokens of each expert.

    Args:
        chosen: the experts of each token; those beyond the last stand for none, and their weights are zero.
        bias: of gate and up, and of what an expert gives.
    """
    count, embed = gate_up.shape[:2]
    rows, order = sort_rows(x, chosen)
    expert, load = chosen.reshape(-1)[order], count_rows(chosen, count)
    hidden = grouped_matmul(rows, gate_up.reshape(count, embed, -1), load)
    hidden = hidden[:, : 2 * down.shape[1]].reshape(len(rows), 2, -1)
    if bias is not None:
        hidden += bias[0].astype(jnp.float32).at[expert].get(mode="clip")
    hidden = gating(hidden[:, 0], hidden[:, 1]).astype(x.dtype)
    out = grouped_matmul(hidden, down, load)
    if bias is not None:
        out += bias[1].astype(jnp.float32).at[expert].get(mode="clip")
    return add_rows(out, order, weights), load
