"""Tables of vectors, cut over devices or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.layers.embedding import Embedding, padded_size, take_rows
from jaxllm.parallel import make_mesh


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("devices", [1, 4])
def test_rows_and_logits(devices: int, dtype: str) -> None:
    with jax.set_mesh(make_mesh(devices)):
        table = Embedding(10, 6, shares=devices, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        weight = np.asarray(table.weight[...].astype(jnp.float32))
        assert weight.shape == (12 if devices == 4 else 10, 6)
        tokens = jnp.asarray([9, 0, 3, 3])
        rows = jax.jit(table.__call__)(tokens)
        assert rows.dtype == dtype
        np.testing.assert_array_equal(np.asarray(rows.astype(jnp.float32)), weight[np.asarray(tokens)])
        logits = jax.jit(table.logits)(rows)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, weight[[9, 0, 3, 3]] @ weight[:10].T, rtol=1e-3, atol=1e-7)


def test_padded_size() -> None:
    assert [padded_size(10, n) for n in (1, 2, 3, 4, 8)] == [10, 10, 12, 12, 16]


def test_rows_out_of_range_are_some_row() -> None:
    """Padding tokens may have any position; their vectors are never used, but must not be NaN."""
    rows = take_rows(jnp.ones((4, 2)), jnp.asarray([-5, 7]))
    np.testing.assert_array_equal(rows, 1.0)
