"""Rotary embeddings."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers.rope import Rope, rotate

ROPE = Rope((1.0, 0.1, 0.01))


def scores(q: np.ndarray, k: np.ndarray, q_at: int, k_at: int) -> float:
    turned = [
        rotate(jnp.asarray(x)[None, None], ROPE.rotation(jnp.asarray([at])))
        for x, at in ((q, q_at), (k, k_at))
    ]
    return float(jnp.sum(turned[0] * turned[1]))


def test_scores_depend_on_distances_only() -> None:
    q, k = np.random.RandomState(0).standard_normal((2, 6)).astype(np.float32)
    assert scores(q, k, 9, 4) == pytest.approx(scores(q, k, 1005, 1000), abs=1e-4)
    assert scores(q, k, 9, 4) != pytest.approx(scores(q, k, 9, 5), abs=1e-2)


def test_dimensions_beyond_the_pairs_stay() -> None:
    x = jnp.arange(8.0)[None, None]
    turned = rotate(x, ROPE.rotation(jnp.asarray([3])))
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])
    assert np.all(np.asarray(turned[..., :6]) != np.asarray(x[..., :6]))


def test_angles_of_far_positions_are_exact() -> None:
    """bfloat16 would round position 257 to 256, and sin(257) is far from sin(256)."""
    rotation = ROPE.rotation(jnp.asarray([257, 100_001]))
    np.testing.assert_allclose(rotation.sin[:, 0], np.sin([257.0, 100_001.0]), atol=1e-6)
    half = rotate(jnp.ones((2, 1, 6), jnp.bfloat16), rotation)
    assert half.dtype == jnp.bfloat16


def test_magnitude_scales_both() -> None:
    one, two = (Rope((1.0,), magnitude).rotation(jnp.arange(4)) for magnitude in (1.0, 2.0))
    np.testing.assert_allclose(two.cos, 2 * one.cos)
    np.testing.assert_allclose(two.sin, 2 * one.sin)
