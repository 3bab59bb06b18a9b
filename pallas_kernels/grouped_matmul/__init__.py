"""Products of rows with the weights of their group, as in a mixture of experts."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.devices import current_device
from pallas_kernels.grouped_matmul.backend import Backend, GroupedMatmulFunction
from pallas_kernels.grouped_matmul.backends import (
    Kernel,
    as_backend,
    choose_backend,
    list_backends,
    register_backend,
)
from pallas_kernels.grouped_matmul.check import check
from pallas_kernels.grouped_matmul.problem import Problem

__all__ = [
    "Backend",
    "GroupedMatmulFunction",
    "Kernel",
    "Problem",
    "as_backend",
    "check",
    "choose_backend",
    "grouped_matmul",
    "list_backends",
    "register_backend",
]


@jax.named_scope("grouped_matmul")
def grouped_matmul(
    x: Float[Array, "tokens in"],
    weights: Shaped[Array, "groups in out"],
    group_sizes: Int[Array, " groups"],
    *,
    out_dtype: DTypeLike = jnp.float32,
    backend: Kernel = "auto",
) -> Float[Array, "tokens out"]:
    """Multiplies the first `group_sizes[0]` rows with `weights[0]`, the next with `weights[1]`, and so on.

    Sums in float32. Under `shard_map` it is each device's own groups, or its part of `in` or `out`.

    Args:
        x: the rows, sorted by group.
        weights: of each group; bfloat16 may be given as its bits, uint16. On CPU that spares a copy of all
            weights at each call; on TPU it costs one.
        group_sizes: rows of each group, any of them 0. Rows beyond their sum are not looked at.

    Returns:
        The products, zero in the rows beyond the sum of the sizes.

    Raises:
        ValueError: there is no such backend, or the shapes do not go together.
        NotImplementedError: the backend does not serve this call; the message says what.
    """
    if x.shape[1] != weights.shape[1] or group_sizes.shape != weights.shape[:1]:
        raise ValueError(
            f"x{list(x.shape)}, weights{list(weights.shape)}, group_sizes{list(group_sizes.shape)}: "
            "these are to be [tokens, in], [groups, in, out] and [groups]"
        )
    platform, device_kind = current_device()
    problem = Problem(
        platform=platform,
        device_kind=device_kind,
        tokens=x.shape[0],
        groups=weights.shape[0],
        inputs=x.shape[1],
        outputs=weights.shape[2],
        dtype=jnp.dtype(x.dtype),
        weight_dtype=jnp.dtype(jnp.bfloat16 if weights.dtype == jnp.uint16 else weights.dtype),
        out_dtype=jnp.dtype(out_dtype),
    )
    chosen = choose_backend(backend, problem).backend
    return chosen.multiply(x, weights, group_sizes, out_dtype=out_dtype)
