"""Log probabilities, ranks and the likeliest tokens are numpy's."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxllm.sampling import token_logprobs


@pytest.mark.parametrize("k", [0, 1, 5, 50])
def test_they_are_numpys(k: int):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(6, 50)) * 8).astype(np.float32)
    tokens = rng.integers(0, 50, 6).astype(np.int32)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    chosen, rank, ids, top = jax.jit(partial(token_logprobs, k=k))(logits, tokens)
    order = np.argsort(-logits, axis=1)
    np.testing.assert_allclose(chosen, expected[np.arange(6), tokens], atol=1e-5)
    assert rank.tolist() == [order[i].tolist().index(tokens[i]) + 1 for i in range(6)]
    assert ids.tolist() == order[:, :k].tolist()
    np.testing.assert_allclose(top, np.take_along_axis(expected, order[:, :k], 1), atol=1e-5)


def test_huge_and_forbidden_logits():
    logits = np.array([[3e38, -np.inf, -3e38], [-1e30, 0.0, -np.inf]], np.float32)
    chosen, rank, ids, top = jax.jit(partial(token_logprobs, k=2))(logits, np.array([0, 2], np.int32))
    assert chosen.tolist() == [0.0, -np.inf]
    assert rank.tolist() == [1, 3]
    assert ids.tolist() == [[0, 2], [1, 0]]
    assert top[:, 0].tolist() == [0.0, 0.0]


def test_ties_share_the_worst_rank_and_come_in_the_order_of_their_ids():
    logits = np.array([[1.0, 2.0, 2.0, 0.0]] * 2, np.float32)
    _, rank, ids, _ = jax.jit(partial(token_logprobs, k=3))(logits, np.array([1, 0], np.int32))
    assert rank.tolist() == [2, 3]
    assert ids[0].tolist() == [1, 2, 0]
