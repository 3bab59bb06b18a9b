"""Rounds the rows of a step to 8 bits, each by its own scale, so that both operands have few bits."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped

Activation = Literal["none", "int8", "fp8"]


def quantize_rows(
    x: Float[Array, "tokens in"], kind: Literal["int8", "fp8"], rows: int
) -> tuple[Shaped[Array, "tokens in"], Float32[Array, "tokens blocks"]]:
    """Values and scales; each token has a scale for every `rows` inputs, as the weight's blocks have.

    The largest magnitude becomes 127 or 448; int8 is rounded to nearest even.
    """
    tokens, inputs = x.shape
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -inputs % min(rows, inputs))))
    blocks = padded.reshape(tokens, -1, min(rows, inputs))
    largest = jnp.abs(blocks).max(axis=2)
    scale = jnp.where(largest > 0, largest / (127.0 if kind == "int8" else 448.0), 1.0)
    values = (blocks / scale[:, :, None]).reshape(padded.shape)[:, :inputs]
    if kind == "fp8":
        return values.astype(jnp.float8_e4m3fn), scale
    return jnp.round(values).astype(jnp.int8), scale
