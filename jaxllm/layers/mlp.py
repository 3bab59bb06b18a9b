"""Feed-forward layers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.layers.linear import Linear, affine
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.packing import Packable, pack_parameter, packing_of
from jaxllm.layers.parameter import parameter, zeros
from pallas_kernels.packed_matmul import Backend, Gate

Activation = Callable[[Float[Array, "..."]], Float[Array, "..."]]


def _exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.gelu(x, approximate=False)


def _quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x * jax.nn.sigmoid(1.702 * x)


# By the names that Hugging Face configs give them.
ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _exact_gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
}


def find_activation(name: str) -> Activation:
    """The function of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act={name!r}: not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


# Activations that products with packed weights come gated by.
GATES: dict[str, Gate] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


class GateUp(Packable):
    """`activation(gate(x)) * up(x)` with gate and up in one weight `[embed, 2, mlp]`.

    Args:
        activation: by Hugging Face's name.
        embed, mlp: sizes.
    """

    def __init__(
        self, embed: int, mlp: int, *, activation: str, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.weight = parameter((embed, 2, mlp), ("embed", None, "mlp"), dtype, rngs)
        self.bias = parameter((2, mlp), (None, "mlp"), dtype, rngs, zeros) if bias else None
        self.activation = activation

    def pack(self, backend: Backend) -> None:
        gate = None if self.bias is not None else GATES.get(self.activation)
        self.weight = pack_parameter(self.weight, (0,), backend, gate)

    def __call__(
        self, x: Float[Array, "tokens embed"], *, norm: RMSNorm | None = None
    ) -> Float[Array, "tokens mlp"]:
        packing = packing_of(self.weight)
        if packing is not None and packing.gate is not None:
            before = None if norm is None else norm.before_product()
            return packing.multiply(x, self.weight[...], x.dtype, norm=before)
        products = affine(x if norm is None else norm(x), self.weight, self.bias)
        gate, up = jnp.moveaxis(products.astype(x.dtype).astype(jnp.float32), 1, 0)
        return (find_activation(self.activation)(gate) * up).astype(x.dtype)


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))` with gate and up in one weight `[embed, 2, mlp]`."""

    def __init__(
        self, embed: int, mlp: int, *, activation: str, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.gate_up = GateUp(embed, mlp, activation=activation, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear((mlp,), (embed,), ("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "tokens embed"],
        *,
        norm: RMSNorm | None = None,
        residual: Float[Array, "tokens embed"] | None = None,
    ) -> Float[Array, "tokens embed"]:
        """Feeds tokens forward; `norm` and `residual` are as `Linear` takes them."""
        return self.down(self.gate_up(x, norm=norm), residual=residual)


class MLP(nnx.Module):
    """`down(activation(up(x)))` (GPT-2)."""

    def __init__(
        self, embed: int, mlp: int, *, activation: str, bias: bool = True, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.up = Linear((embed,), (mlp,), ("embed", "mlp"), bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear((mlp,), (embed,), ("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "tokens embed"]) -> Float[Array, "tokens embed"]:
        hidden = find_activation(self.activation)(self.up(x).astype(jnp.float32))
        return self.down(hidden.astype(x.dtype))
