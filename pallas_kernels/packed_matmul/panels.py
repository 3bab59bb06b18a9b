"""How a weight is packed for products on CPU: panels of 32 outputs, which a kernel reads from end to end."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

OUTPUTS = 32
"""Of a panel: two vectors of AVX-512, two tiles of AMX."""
DEPTH = 16
"""Words that a panel's depth is padded to: a tile of AMX."""

Gate = Literal["silu", "gelu_tanh"]
"""What a gate's outputs go through before others are multiplied with them: `jax.nn.silu` or `jax.nn.gelu`."""

Panels = Shaped[Array, "panels depth 32"]
"""Words of four bytes: a float32, or as uint32 two bfloat16 of neighbouring inputs, the first in the low
half.

Pairs are what AVX-512's and AMX's products of bfloat16 take. As bits they are safe from XLA on CPU, which
turns a whole bfloat16 array into float32 and back where it gathers from one.
"""


def packed_shape(inputs: int, outputs: int, dtype: jnp.dtype, *, gated: bool = False) -> jax.ShapeDtypeStruct:
    """What `pack` makes of a weight `[inputs, outputs]`, or `pack_gated` of one `[inputs, 2, outputs]`.

    Raises:
        NotImplementedError: weights of this dtype are not packed.
    """
    words = -(-inputs // _inputs_of_a_word(dtype))
    width = OUTPUTS // 2 if gated else OUTPUTS
    shape = (-(-outputs // width), -(-words // DEPTH) * DEPTH, OUTPUTS)
    return jax.ShapeDtypeStruct(shape, jnp.uint32 if dtype == jnp.bfloat16 else dtype)


def pack(weight: Float[Array, "in out"]) -> Panels:
    """A weight in panels, padded with zeros.

    Raises:
        NotImplementedError: weights of this dtype are not packed.
    """
    inputs, outputs = weight.shape
    panels, depth, _ = packed_shape(inputs, outputs, weight.dtype).shape
    each = _inputs_of_a_word(weight.dtype)
    bits = weight if each == 1 else jax.lax.bitcast_convert_type(weight, jnp.uint16)
    bits = jnp.pad(bits, ((0, depth * each - inputs), (0, panels * OUTPUTS - outputs)))
    words = bits.reshape(depth, each, panels, OUTPUTS).transpose(2, 0, 3, 1)
    return words[..., 0] if each == 1 else jax.lax.bitcast_convert_type(words, jnp.uint32)


def pack_gated(weight: Float[Array, "in 2 out"]) -> Panels:
    """A gate's weight and that of what it is for: a panel has 16 outputs of one and their counterparts.

    Raises:
        NotImplementedError: weights of this dtype are not packed.
    """
    inputs, _, outputs = weight.shape
    half = OUTPUTS // 2
    padded = jnp.pad(weight, ((0, 0), (0, 0), (0, -outputs % half)))
    return pack(padded.reshape(inputs, 2, -1, half).swapaxes(1, 2).reshape(inputs, -1))


def split_gated(products: Float[Array, "rows columns"], outputs: int) -> Float[Array, "2 rows out"]:
    """The gate's part and the other of products with all columns that `pack_gated` made."""
    half = OUTPUTS // 2
    parts = products.reshape(len(products), -1, 2, half).transpose(2, 0, 1, 3)
    return parts.reshape(2, len(products), -1)[..., :outputs]


def unpack(panels: Panels, inputs: int, outputs: int) -> Float[Array, "in out"]:
    """The weight that `pack` was given."""
    words = _values(panels).transpose(1, 3, 0, 2)
    return words.reshape(words.shape[0] * words.shape[1], -1)[:inputs, :outputs]


def take_outputs(panels: Panels, ids: Int[Array, " n"], inputs: int) -> Float[Array, "n in"]:
    """The weights that lead to each of the outputs `ids`, which are to be in range: columns of the weight."""
    words = panels.at[ids // OUTPUTS, :, ids % OUTPUTS].get(mode="clip")
    return _values(words).reshape(len(ids), -1)[:, :inputs]


def _inputs_of_a_word(dtype: jnp.dtype) -> int:
    if dtype == jnp.bfloat16:
        return 2
    if dtype == jnp.float32:
        return 1
    raise NotImplementedError(f"weights of {jnp.dtype(dtype)}: packed are float32, bfloat16")


def _values(words: Array) -> Float[Array, "... inputs_of_a_word"]:
    if words.dtype == jnp.uint32:
        return jax.lax.bitcast_convert_type(words, jnp.bfloat16)
    return words[..., None]
