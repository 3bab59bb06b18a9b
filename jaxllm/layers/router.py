"""Which experts a token goes to, and with what weights."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxllm.layers.parameter import parameter, zeros

Scoring = Literal["softmax", "sigmoid"]
"""Scores of the experts share one, or each expert has its own."""
GroupScore = Literal["best", "best two"]
"""A group of experts is as good as its best, or as the sum of its best two."""


@dataclass(frozen=True)
class RoutingOptions:
    """What sets one family's routers apart from another's.

    Attributes:
        experts: how many there are to choose from.
        per_token: how many a token goes to.
        normalize: the weights of a token's experts are made to add up to one.
        scale: multiplies the weights.
        bias: of the products (gpt-oss).
        correction: a bias that is added to scores to choose by them, and not to weights (DeepSeek-V3).
        groups, groups_per_token: experts are cut into groups, in order, and only those of a token's best
            groups are chosen from.
        group_score: by which groups are compared.
    """

    experts: int
    per_token: int
    scoring: Scoring = "softmax"
    normalize: bool = True
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: int = 1
    groups_per_token: int = 1
    group_score: GroupScore = "best"

    def __post_init__(self) -> None:
        per_token, experts = self.per_token, self.experts
        if not 1 <= per_token <= experts:
            raise ValueError(
                f"num_experts_per_tok={per_token}: must be from 1 to the number of experts={experts}"
            )
        if self.groups < 1 or self.experts % self.groups:
            raise ValueError(f"n_group={self.groups}: must divide the number of experts={self.experts}")
        if self.groups == self.experts > 1 and self.group_score == "best two":
            raise ValueError(f"n_group={self.groups}: groups of one expert have no best two; have fewer")
        if not 1 <= self.groups_per_token <= self.groups:
            raise ValueError(f"topk_group={self.groups_per_token}: must be from 1 to n_group={self.groups}")
        if self.per_token > self.groups_per_token * self.experts // self.groups:
            raise ValueError(
                f"num_experts_per_tok={self.per_token}: topk_group={self.groups_per_token} groups have only "
                f"{self.groups_per_token * self.experts // self.groups} experts"
            )


class Routing(NamedTuple):
    """Each token's experts."""

    experts: Int32[Array, "tokens chosen"]
    weights: Float[Array, "tokens chosen"]
    """float32."""


class Router(nnx.Module):
    """Scores every expert for every token, in float32, and chooses the best.

    In bfloat16 experts with nearly equal scores would change places. The weight is whole on every device.
    """

    def __init__(self, embed: int, options: RoutingOptions, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        count = options.experts
        self.weight = parameter((embed, count), ("embed", None), dtype, rngs)
        self.bias = parameter((count,), (None,), dtype, rngs, zeros) if options.bias else None
        # Its steps are smaller than those of bfloat16: checkpoints keep it in float32.
        corrected = options.correction
        self.correction = (
            parameter((count,), (None,), jnp.dtype("float32"), rngs, zeros) if corrected else None
        )
        self.options = options

    @jax.named_scope("router")
    def __call__(self, x: Float[Array, "tokens embed"]) -> Routing:
        options = self.options
        weight = self.weight[...].astype(jnp.float32)
        logits = jnp.matmul(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
        if self.bias is not None:
            logits += self.bias[...].astype(jnp.float32)
        scores = jax.nn.softmax(logits) if options.scoring == "softmax" else jax.nn.sigmoid(logits)
        chosen_by = scores if self.correction is None else scores + self.correction[...]
        if options.groups > 1:
            chosen_by = _within_groups(chosen_by, options)
        _, experts = jax.lax.top_k(chosen_by, options.per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if options.normalize:
            weights /= jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-20)  # sigmoids may all be zero
        return Routing(experts, weights * options.scale)


def _within_groups(
    scores: Float[Array, "tokens experts"], options: RoutingOptions
) -> Float[Array, "tokens experts"]:
    """The scores of each token's best groups, minus infinity in the others (DeepSeek-V2, section 2.2.2)."""
    grouped = scores.reshape(len(scores), options.groups, -1)
    counted = 1 if options.group_score == "best" else 2
    of_groups = jax.lax.top_k(grouped, counted)[0].sum(axis=-1)
    _, best = jax.lax.top_k(of_groups, options.groups_per_token)
    kept = (best[:, :, None] == jnp.arange(options.groups)).any(axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(scores.shape)
