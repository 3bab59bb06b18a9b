"""Settings hold what a request asks for, and the state is updated in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.sampling import Limits, SamplerConfig, SamplingParams, empty_state, load_row, row_settings, sample
from jaxllm.sampling.settings import pack_bits
from jaxllm.sampling.state import unpack_bits

CONFIG = SamplerConfig(100, Limits(logit_bias=2, stop_ids=2, bad_words=2, bad_word_tokens=3))


def settings_of(params: SamplingParams, **options):
    return row_settings(CONFIG, params, **{"seed": 0, "prompt_token_ids": [1, 2], **options})


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (SamplingParams(logit_bias={1: 1, 2: 2, 3: 3}), {}, "logit_bias: 3 entries; at most 2"),
        (SamplingParams(min_tokens=1), {"stop_token_ids": {1, 2, 3}}, "stop_token_ids: 3 .* at most 2"),
        (SamplingParams(), {"bad_word_ids": [[1], [2], [3]]}, "bad_words: 3 token sequences; at most 2"),
        (SamplingParams(), {"bad_word_ids": [[1, 2, 3, 4]]}, "bad_words: 4 tokens in a word; at most 3"),
        (SamplingParams(logit_bias={100: 1}), {}, r"logit_bias has \[100\].*0 to 99"),
        (SamplingParams(allowed_token_ids=[5, 100]), {}, r"allowed_token_ids has \[100\]"),
        (SamplingParams(min_tokens=1), {"stop_token_ids": [100]}, r"stop_token_ids has \[100\]"),
        (SamplingParams(), {"bad_word_ids": [[100]]}, r"bad_words has \[100\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(params: SamplingParams, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        settings_of(params, **options)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0, seed=3), SamplingParams(top_p=0.5, top_k=3, min_p=0.1)],
)
def test_usual_requests_upload_a_few_numbers(params: SamplingParams):
    settings = settings_of(params, stop_token_ids=[1, 2])
    assert settings.tables is None
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(settings)) < 64


def test_stop_tokens_are_held_back_only_with_min_tokens():
    many = set(range(50))
    assert settings_of(SamplingParams(), stop_token_ids=many).tables is None


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100])
def test_bits_are_packed_and_unpacked(vocab: int):
    ids = [token for token in range(vocab) if token % 3 == 0]
    words = pack_bits(ids, vocab, "ids")
    assert len(words) == -(-vocab // 32)
    mask = np.asarray(unpack_bits(jnp.asarray(words)[None], vocab))[0]
    assert np.flatnonzero(mask).tolist() == ids


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(presence_penalty=1)])
def test_loading_a_row_changes_that_row_alone_and_in_place(params: SamplingParams):
    config = SamplerConfig(5000)
    load = jax.jit(load_row, donate_argnums=0)
    settings = row_settings(config, params, seed=7, prompt_token_ids=[1, 2], output_token_ids=[9])
    state = empty_state(config, 64)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    memory = load.lower(state, np.int32(3), settings).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 20
    before = jax.tree.map(np.asarray, state)
    after = jax.tree.map(np.array, load(state, np.int32(3), settings))
    tables = settings.tables or jax.tree.map(lambda leaf: leaf[3], before.tables)
    for old, new, row in zip(*map(jax.tree.leaves, (before, after, (settings.scalars, tables))), strict=True):
        np.testing.assert_array_equal(new[3], row)
        np.testing.assert_array_equal(np.delete(new, 3, axis=0), np.delete(old, 3, axis=0))


def test_a_step_updates_the_state_in_place_and_needs_little_beside_it():
    """In a program that makes its logits itself, as the runner's do."""
    vocab, rows, seqs = 8192, 256, 16
    config = SamplerConfig(vocab)
    state = empty_state(config, rows)

    def step(hidden, state, rows, lengths, recent):
        return sample(
            jax.lax.optimization_barrier(jnp.tile(hidden, (1, vocab // 8))), state, rows, lengths, recent
        )

    integers = jnp.arange(seqs, dtype=jnp.int32)
    arguments = (jnp.ones((seqs, 8)), state, integers, integers, jnp.zeros((seqs, 15), jnp.int32))
    memory = jax.jit(step, donate_argnums=1).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    size, logits = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), seqs * vocab * 4
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < 3.5 * logits < size / 4


def test_seeds_and_lengths_are_taken_from_the_request():
    scalars = settings_of(SamplingParams(min_tokens=5), seed=(3 << 32) + 4, stop_token_ids=[1]).scalars
    assert scalars.seed.tolist() == [3, 4]
    assert (scalars.prompt_length, scalars.min_length) == (2, 7)
