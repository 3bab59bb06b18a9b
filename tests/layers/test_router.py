"""Which experts are chosen, with what weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.layers.router import Router, RoutingOptions

LOGITS = [[0.0, 3.0, 1.0, 2.9, -1.0, 2.5, 2.6, 0.5]]


def route(correction: list[float] | None = None, **options: Any) -> tuple[list[int], np.ndarray]:
    """Experts and weights of a token with these logits."""
    chosen = RoutingOptions(8, correction=correction is not None, **{"per_token": 2, **options})
    router = Router(1, chosen, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    router.weight[...] = jnp.asarray(LOGITS)
    if router.correction is not None:
        router.correction[...] = jnp.asarray(correction)
    experts, weights = jax.jit(router.__call__)(jnp.ones((1, 1)))
    return experts[0].tolist(), np.asarray(weights[0])


def softmax(*experts: int) -> np.ndarray:
    scores = np.exp(LOGITS[0])
    return (scores / scores.sum())[list(experts)]


def test_best_experts_with_weights_that_add_up() -> None:
    experts, weights = route()
    assert experts == [1, 3]
    np.testing.assert_allclose(weights, softmax(1, 3) / softmax(1, 3).sum(), rtol=1e-6)


def test_weights_as_they_are_and_scaled() -> None:
    experts, weights = route(normalize=False, scale=16.0)
    assert experts == [1, 3]
    np.testing.assert_allclose(weights, 16.0 * softmax(1, 3), rtol=1e-6)


@pytest.mark.parametrize(("score", "expected"), [("best", [1, 0]), ("best two", [3, 2])])
def test_only_experts_of_the_best_group(score: Any, expected: list[int]) -> None:
    """The first pair has the best expert, the second the best two."""
    experts, _ = route(groups=4, groups_per_token=1, group_score=score, scoring="sigmoid")
    assert experts == expected


def test_correction_chooses_but_does_not_weigh() -> None:
    experts, weights = route([0.0] * 4 + [9.0] + [0.0] * 3, scoring="sigmoid", normalize=False)
    assert experts == [4, 1]
    np.testing.assert_allclose(weights, 1 / (1 + np.exp([1.0, -3.0])), rtol=1e-6)


def test_scores_are_float32_whatever_the_model_is() -> None:
    """Logits of 256.0 and 256.5 are one number in bfloat16, 256.0 and the first would win."""
    router = Router(2, RoutingOptions(2, 1), dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))
    router.weight[...] = jnp.asarray([[256.0, 256.0], [0.0, 0.5]], jnp.bfloat16)
    experts, weights = router(jnp.ones((1, 2), jnp.bfloat16))
    assert experts.tolist() == [[1]]
    assert weights.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_token": 9}, "num_experts_per_tok=9: must be from 1 to the number of experts=8"),
        ({"groups": 3}, "n_group=3: must divide the number of experts=8"),
        ({"groups": 2, "groups_per_token": 3}, "topk_group=3: must be from 1 to n_group=2"),
        ({"groups": 4, "per_token": 3}, "topk_group=1 groups have only 2 experts"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingOptions(8, **{"per_token": 2, **options})
