"""min_p, top_k and top_p keep what numpy keeps, however the row is searched."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.sampling import SamplerConfig, SamplingParams, filters, row_settings

VOCAB = 64


@cache
def filter_of(block: int, blocks_first: int):
    def run(weights, scalars):
        with pytest.MonkeyPatch.context() as patch:  # read while tracing
            patch.setattr(filters, "_BLOCK", block)
            patch.setattr(filters, "_BLOCKS_FIRST", blocks_first)
            return filters.filter_weights(weights, scalars)

    return jax.jit(run)


def scalars_of(*params: SamplingParams):
    scalars = [row_settings(SamplerConfig(VOCAB), p, seed=0, prompt_token_ids=[1]).scalars for p in params]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *scalars)


def bounds(weights: np.ndarray, p: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Which weights surely stay, and which may: apart where a sum is within a rounding error of top_p."""
    w = weights.astype(np.float64)
    w[w < np.float32(p.min_p)] = 0
    if p.top_k > 0:
        w[w < np.sort(w)[-min(p.top_k, len(w))]] = 0
    if p.top_p == 1:
        return w > 0, w > 0
    heavier = np.array([w[w > one].sum() for one in w])
    edge = p.top_p * w.sum()
    return (heavier < edge * (1 - 1e-5)) & (w > 0), (heavier < edge * (1 + 1e-5)) & (w > 0)


rows = st.lists(  # without subnormal numbers, which processors may take for zero
    st.one_of(
        st.floats(0, 1, width=32, allow_subnormal=False), st.sampled_from([0.0, 0.25, 0.5, 1.0, 1e-30])
    ),
    min_size=VOCAB,
    max_size=VOCAB,
)
options = st.builds(
    SamplingParams,
    top_k=st.one_of(st.just(0), st.integers(1, VOCAB + 2)),
    top_p=st.one_of(st.just(1.0), st.floats(1e-4, 1.0)),
    min_p=st.sampled_from([0.0, 0.01, 0.3]),
)


@pytest.mark.parametrize(("block", "blocks_first"), [(32, 64), (4, 2), (1, 16)])
@given(first=rows, second=rows, params=st.tuples(options, options))
def test_what_stays_is_what_numpy_keeps(block: int, blocks_first: int, first, second, params):
    weights = np.array([first, second], np.float32)
    weights[:, 5] = 1.0  # the likeliest token weighs 1
    kept = np.asarray(filter_of(block, blocks_first)(weights, scalars_of(*params)))
    for before, after, p in zip(weights, kept, params, strict=True):
        surely, maybe = bounds(before, p)
        assert np.all(after[surely] == before[surely])
        assert np.all(after[~maybe] == 0)


@pytest.mark.parametrize("spread", [0.01, 8.0])
def test_a_large_vocabulary(spread: float):
    """Flat rows are searched whole, peaked ones in their heaviest blocks."""
    x = np.random.default_rng(0).normal(size=(2, 9000)) * spread
    weights = np.exp(x - x.max(axis=1, keepdims=True)).astype(np.float32)
    for p in (SamplingParams(top_k=50), SamplingParams(top_p=0.5), SamplingParams(top_k=3000, top_p=0.9)):
        kept = np.asarray(filter_of(32, 64)(weights, scalars_of(p, SamplingParams())))
        surely, maybe = bounds(weights[0], p)
        assert np.all(kept[0][surely] > 0)
        assert np.all(kept[0][~maybe] == 0)
        assert np.all(kept[1] == weights[1])


def test_a_large_vocabulary_on_two_devices():
    """Compiled as a program of an engine that is cut, where XLA rewrites the top_k in another way."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    weights = np.random.default_rng(0).uniform(size=(2, 9000)).astype(np.float32)
    scalars = scalars_of(SamplingParams(top_k=50), SamplingParams(top_p=0.5))
    cut = jax.device_put(weights, NamedSharding(mesh, PartitionSpec(None, "tensor")))
    run = filter_of(32, 64)
    assert np.array_equal(run(cut, scalars), run(weights, scalars))
