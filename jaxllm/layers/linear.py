"""Linear layers over any number of input and output axes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.packing import Packable, pack_parameter, packing_of
from jaxllm.layers.parameter import parameter, zeros
from jaxllm.parallel import Axes
from pallas_kernels.packed_matmul import Backend


def contract(
    x: Float[Array, "tokens *inputs"], weight: Float[Array, "..."]
) -> Float[Array, "tokens *outputs"]:
    """Sums over all of `x`'s axes but the first, in float32, whatever the operands are.

    A product of bfloat16 with a bfloat16 result is 10 times slower on CPU, and with a float32 result the
    devices of a mesh add up their parts without rounding them first.
    """
    inputs = x.ndim - 1
    axes = (tuple(range(1, x.ndim)), tuple(range(inputs)))
    return jax.lax.dot_general(x, weight, (axes, ((), ())), preferred_element_type=jnp.float32)


def affine(
    x: Float[Array, "tokens *inputs"], weight: nnx.Param[Array], bias: nnx.Param[Array] | None
) -> Float[Array, "tokens *outputs"]:
    """`x @ weight + bias` in float32; the weight may be packed."""
    packing = packing_of(weight)
    y = contract(x, weight[...]) if packing is None else packing.multiply(x, weight[...], jnp.float32)
    return y if bias is None else y + bias[...].astype(jnp.float32)


class Linear(Packable):
    """`norm(x) @ weight + bias + residual`; weight `[*inputs, *outputs]`, bias `[*outputs]`.

    Args:
        inputs, outputs: sizes of the axes that are summed over, and of those that are made.
        axes: the weight's logical axes.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        axes: Axes,
        *,
        bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.weight = parameter((*inputs, *outputs), axes, dtype, rngs)
        self.bias = parameter(tuple(outputs), axes[len(inputs) :], dtype, rngs, zeros) if bias else None
        self.num_inputs = len(inputs)

    def pack(self, backend: Backend) -> None:
        self.weight = pack_parameter(self.weight, range(self.num_inputs), backend)

    def __call__(
        self,
        x: Float[Array, "tokens *inputs"],
        *,
        norm: RMSNorm | None = None,
        residual: Float[Array, "tokens *outputs"] | None = None,
    ) -> Float[Array, "tokens *outputs"]:
        """The products of tokens.

        Args:
            norm: of `x`, before; a kernel for packed weights does it along with the product.
            residual: added to the result; with packed weights before it is rounded.
        """
        packing = packing_of(self.weight)
        if packing is not None and self.bias is None:
            before = None if norm is None else norm.before_product()
            return packing.multiply(x, self.weight[...], x.dtype, norm=before, residual=residual)
        # rounded first: where devices add up their parts, they send half as much as in float32
        y = affine(x if norm is None else norm(x), self.weight, self.bias).astype(x.dtype)
        return y if residual is None else y + residual
