"""Tables of vectors: tokens in, logits out, and learned positions."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.layers.packing import Packable, pack_parameter, packing_of
from jaxllm.layers.parameter import parameter
from jaxllm.parallel import EVERY_DEVICE, partition_spec
from pallas_kernels.packed_matmul import Backend


def padded_size(vocab_size: int, shares: int) -> int:
    """Rows of a table that is cut evenly over so many devices."""
    return -(-vocab_size // shares) * shares


def take_rows(table: Float[Array, "rows embed"], ids: Int[Array, " n"]) -> Float[Array, "n embed"]:
    """`table[ids]`, for ids in range.

    On CPU two-byte rows are taken as bits: a gather on a bfloat16 array makes XLA turn the whole of it into
    float32 and back, at every step. For TPU it is the bits that XLA would write anew, all of them.
    """
    if table.dtype.itemsize != 2:
        return _take(table, ids)
    return jax.lax.platform_dependent(table, ids, cpu=_take_bits, default=_take)


def _take(table: Array, ids: Array) -> Array:
    return table.at[ids].get(mode="clip")


def _take_bits(table: Array, ids: Array) -> Array:
    return jax.lax.bitcast_convert_type(
        _take(jax.lax.bitcast_convert_type(table, jnp.uint16), ids), table.dtype
    )


class Embedding(Packable):
    """A table `[padded vocab, embed]`, each device holding a run of the rows.

    Reads rows for tokens, and as a language model's head gives the products with all rows.
    """

    def __init__(self, vocab_size: int, embed: int, *, shares: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        rows = padded_size(vocab_size, shares)
        self.axes = ("vocab", "embed")
        self.weight = parameter((rows, embed), self.axes, dtype, rngs)
        self.vocab_size = vocab_size

    def pack(self, backend: Backend) -> None:
        self.weight = pack_parameter(self.weight, (1,), backend)

    def __call__(self, tokens: Int[Array, " tokens"]) -> Float[Array, "tokens embed"]:
        """Each device looks up the tokens it holds; their sum is what all see, and no table moves."""

        def lookup(table: Array, tokens: Array) -> Array:
            local = tokens - jax.lax.axis_index(EVERY_DEVICE) * table.shape[0]
            mine = (local >= 0) & (local < table.shape[0])
            rows = take_rows(table, local)
            return jax.lax.psum(jnp.where(mine[:, None], rows, 0), EVERY_DEVICE)

        packing = packing_of(self.weight)
        if packing is not None:
            return packing.take(self.weight[...], tokens)
        shape = jax.sharding.get_abstract_mesh().shape
        if all(shape[axis] == 1 for axis in EVERY_DEVICE):
            return take_rows(self.weight[...], tokens)
        specs = (partition_spec(self.axes), PartitionSpec())
        return jax.shard_map(lookup, in_specs=specs, out_specs=PartitionSpec())(self.weight[...], tokens)

    def logits(self, hidden: Float[Array, "n embed"]) -> Float[Array, "n vocab"]:
        """Products with every row of the vocabulary, in float32, whole on each device."""

        def score(hidden: Array, table: Array) -> Array:
            # Not `table.T`: with it XLA on CPU makes a float32 copy of a bfloat16 table at every step.
            axes = (((1,), (1,)), ((), ()))
            return jax.lax.dot_general(hidden, table, axes, preferred_element_type=jnp.float32)

        packing = packing_of(self.weight)
        if packing is not None:
            return packing.multiply(hidden, self.weight[...], jnp.float32)
        # Said device by device: asked only for whole logits, the compiler gathers the table instead.
        specs = (PartitionSpec(), partition_spec(self.axes))
        cut = jax.shard_map(score, in_specs=specs, out_specs=partition_spec((None, "vocab")))
        whole = jax.lax.with_sharding_constraint(cut(hidden, self.weight[...]), PartitionSpec())
        return whole[:, : self.vocab_size]


class PositionEmbedding(nnx.Module):
    """Learned vectors for positions, on every device (GPT-2)."""

    def __init__(self, positions: int, embed: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.weight = parameter((positions, embed), ("positions", "embed"), dtype, rngs)

    def __call__(self, positions: Int[Array, " tokens"]) -> Float[Array, "tokens embed"]:
        return take_rows(self.weight[...], positions)
