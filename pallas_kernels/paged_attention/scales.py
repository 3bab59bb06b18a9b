"""Keys and values in 8 bits: what is stored is the value divided by its head's scale."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.paged_attention.layout import PageGeometry

LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
"""The greatest magnitude that each 8-bit dtype of pages holds; larger values are clipped to it."""

Scale = Float[Array, " kv_heads"]


def check_scales(geometry: PageGeometry, k_scale: Scale | None, v_scale: Scale | None) -> None:
    """Whether the scales go with the pages.

    Raises:
        ValueError: int8 pages without scales, or pages of floats with them.
        NotImplementedError: pages of keys alone that have or need scales.
    """
    dtype = geometry.dtype
    if geometry.shared and (dtype == jnp.int8 or k_scale is not None or v_scale is not None):
        raise NotImplementedError(
            "k_scale, v_scale: pages of keys alone are read without; leave them out, and keep floats"
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None and dtype == jnp.int8:
            raise ValueError(f"{name}: pages of int8 need one, a number for each kv head")
        if scale is not None and dtype not in LARGEST:
            raise ValueError(f"{name}: pages of {dtype} hold values as they are; leave it out")


def to_stored(
    x: Float[Array, "... kv_heads dim"], dtype: jnp.dtype, scale: Scale | None
) -> Shaped[Array, "... kv_heads dim"]:
    """Keys or values as pages of `dtype` hold them: float32 division, rounding to nearest even."""
    largest = LARGEST.get(jnp.dtype(dtype))
    if largest is None:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    x = jnp.clip(x if scale is None else x / scale[:, None], -largest, largest)
    return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype)
