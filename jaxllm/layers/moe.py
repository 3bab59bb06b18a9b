"""Mixtures of experts (https://arxiv.org/abs/1701.06538)."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.layers.batch import Batch
from jaxllm.layers.expert_copies import Copies
from jaxllm.layers.expert_exchange import Exchange
from jaxllm.layers.experts import Experts, Gating
from jaxllm.layers.linear import Linear
from jaxllm.layers.mlp import GatedMLP
from jaxllm.layers.router import Router, RoutingOptions


@dataclass(frozen=True)
class MixtureOptions:
    """What sets one family's mixtures apart from another's.

    Attributes:
        expert_size: width of an expert.
        bias: whether experts have biases.
        shared_size: width of the expert that every token goes through; 0: there is none.
        shared_gate: its output is multiplied by a number between 0 and 1 that depends on the token.
        exchange: how tokens come to the devices of their experts; None: every device has all tokens.
        copies: of experts' weights; None: each expert's are there once, in order.
    """

    routing: RoutingOptions
    expert_size: int
    gating: Gating
    bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    exchange: Exchange | None = None
    copies: Copies | None = None

    @property
    def slots(self) -> int:
        """Weights of experts on all devices, copies included."""
        return self.routing.experts if self.copies is None else self.copies.slots


class Mixture(nnx.Module):
    """A router, its experts, and for some families one more that all tokens go through.

    There is no capacity: however many tokens an expert gets, none is dropped.
    """

    def __init__(self, embed: int, options: MixtureOptions, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        routing, size = options.routing, options.shared_size
        self.router = Router(embed, routing, dtype=dtype, rngs=rngs)
        self.experts = Experts(
            routing.experts,
            embed,
            options.expert_size,
            gating=options.gating,
            bias=options.bias,
            exchange=options.exchange,
            copies=options.copies,
            dtype=dtype,
            rngs=rngs,
        )
        activation = options.gating.activation
        self.shared = GatedMLP(embed, size, activation=activation, dtype=dtype, rngs=rngs) if size else None
        gated = options.shared_gate
        self.shared_gate = Linear((embed,), (1,), ("embed", None), dtype=dtype, rngs=rngs) if gated else None

    def __call__(self, x: Float[Array, "tokens embed"], batch: Batch) -> Float[Array, "tokens embed"]:
        out, load = self.experts(x, self.router(x), batch.used, batch.positions[0])
        if batch.expert_load is not None:
            batch.expert_load.append(load)
        out = out.astype(x.dtype)
        if self.shared is None:
            return out
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared *= nnx.sigmoid(self.shared_gate(x))
        return out + shared
