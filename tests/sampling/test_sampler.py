"""Tokens are distributed as the parameters say, whatever else is in the batch."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_reference import (
    SIZE,
    WINDOW,
    Case,
    config_of,
    draws,
    load,
    next_tokens,
    reference,
    sampler,
    stream,
)
from scipy.stats import chisquare

from jaxllm.sampling import SamplingParams, empty_state, sample
from jaxllm.sampling import sampler as sampler_module

VOCAB = 24
LOGITS = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 1.5
FIRST, SECOND = (int(token) for token in np.argsort(-LOGITS)[:2])
"""The likeliest tokens."""


def params(**options) -> SamplingParams:
    return SamplingParams(**options)


CASES = {
    "plain": Case(params()),
    "cold": Case(params(temperature=0.5)),
    "hot": Case(params(temperature=3.0)),
    "top_k": Case(params(top_k=4)),
    "top_p": Case(params(top_p=0.6)),
    "min_p": Case(params(min_p=0.2)),
    "top_k, top_p": Case(params(top_k=6, top_p=0.7)),
    "all filters": Case(params(temperature=1.7, top_k=9, top_p=0.8, min_p=0.1)),
    "repetition": Case(params(repetition_penalty=1.8), output=(FIRST, 5, 5)),
    "repetition below 1": Case(params(repetition_penalty=0.4), output=(4, FIRST)),
    "presence": Case(params(presence_penalty=1.6), output=tuple(range(12))),
    "presence below 0": Case(params(presence_penalty=-1.5), output=(FIRST, 4, 4)),
    "frequency": Case(params(frequency_penalty=0.9), output=tuple(range(12)) + (0, 1, 2, 3) * 2),
    "bias": Case(params(logit_bias={3: 2.5, "7": -4.0})),
    "allowed": Case(params(allowed_token_ids=[2, 3, 5, 7, 23])),
    "prompt": Case(params(repetition_penalty=2.5), prompt=tuple(range(0, VOCAB, 2))),
    "bad word": Case(params(bad_words=["x"]), output=(4,), bad_words=((FIRST,), (9, 4, 2))),
    "bad words": Case(params(bad_words=["x"]), output=(9, 4), bad_words=((9, 4, FIRST), (4, 1), (8, 4, 0))),
    "min_tokens": Case(params(min_tokens=3), output=(4, 5), stops=(FIRST, 0)),
    "everything": Case(
        params(
            temperature=1.3,
            top_k=12,
            top_p=0.9,
            min_p=0.02,
            repetition_penalty=1.2,
            presence_penalty=0.4,
            frequency_penalty=0.3,
            logit_bias={3: 1.0, 20: 3.0},
            allowed_token_ids=list(range(2, VOCAB)),
            bad_words=["x"],
            min_tokens=8,
        ),
        output=(9, 4, 9, 20),
        stops=(5, 6),
        bad_words=((20, 7), (9, 20, 8)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_drawn_with_their_exact_probabilities(name: str):
    case = CASES[name]
    expected = reference(LOGITS, case)
    if name != "plain":  # otherwise a sampler that ignores the parameter would pass
        assert np.abs(expected - reference(LOGITS, CASES["plain"])).sum() > 0.15
    tokens = draws(LOGITS, case)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    wanted = expected * len(tokens)
    often = wanted >= 5
    observed, wanted = (np.append(x[often], x[~often].sum()) for x in (counts, wanted))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_greedy_takes_the_likeliest_of_the_changed_logits(name: str):
    case = CASES[name]
    fields = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    fields += ("allowed_token_ids", "bad_words", "min_tokens")
    greedy = params(temperature=0, **{field: getattr(case.params, field) for field in fields})
    case = replace(case, params=greedy)
    assert next_tokens([LOGITS], [case])[0] == [reference(LOGITS, case).argmax()]


def test_a_requests_positions_and_seeds_draw_independently():
    first, second = stream(LOGITS, 5), stream(LOGITS, 6)
    same = (reference(LOGITS, CASES["plain"]) ** 2).sum()
    assert abs((first == second).mean() - same) < 0.03
    assert abs((first[1:] == first[:-1]).mean() - same) < 0.03


def test_each_of_a_seeds_64_bits_counts():
    seeds = [0, *(1 << bit for bit in range(64))]
    tokens = {tuple(stream(LOGITS, seed)[:32]) for seed in seeds}
    assert len(tokens) == 65


def test_a_negative_seed_is_its_twos_complement():
    assert stream(LOGITS, -7).tolist() == stream(LOGITS, 2**64 - 7).tolist()


def mixed_batch(vocab: int) -> tuple[np.ndarray, list[Case]]:
    names = ("plain", "cold", "top_p", "min_p", "top_k, top_p", "presence", "bias", "everything")
    cases = [replace(CASES[name], seed=seed) for seed, name in enumerate(names)]
    cases[1] = Case(params(temperature=0))
    return np.random.default_rng(1).normal(size=(SIZE, vocab)) * 3, cases


@pytest.mark.parametrize("vocab", [24, 5000])
def test_a_row_draws_the_same_token_alone_and_in_a_mixed_batch(vocab: int):
    logits, cases = mixed_batch(vocab)
    together, _ = next_tokens(logits, cases, rows=[6, 3, 0, 7, 2, 1, 5, 4])
    alone = [next_tokens(logits[[i]], [case], rows=[i])[0][0] for i, case in enumerate(cases)]
    assert together == alone
    neighbour = Case(params(temperature=0, presence_penalty=1.0))
    beside = [next_tokens([-logits[i], logits[i]], [neighbour, case])[0][1] for i, case in enumerate(cases)]
    assert together == beside


def test_the_result_does_not_depend_on_how_rows_are_grouped(monkeypatch: pytest.MonkeyPatch):
    """On CPU rows are worked on 4 at a time, elsewhere all at once."""
    logits, cases = mixed_batch(24)
    expected, _ = next_tokens(logits, cases)
    monkeypatch.setattr(sampler_module, "_CPU_GROUP", 8)
    sampler.cache_clear()
    assert next_tokens(logits, cases)[0] == expected
    sampler.cache_clear()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_it_lowers_for_accelerators_without_groups(platform: str):
    arguments = (
        jnp.zeros((8, VOCAB)),
        empty_state(config_of(VOCAB), 4),
        jnp.arange(8),
        jnp.ones(8, jnp.int32),
    )
    traced = jax.jit(sample).trace(*arguments, jnp.zeros((8, WINDOW), jnp.int32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert f"tensor<2x4x{VOCAB}xf32>" not in text
    assert f"tensor<2x4x{VOCAB}xf32>" in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("vocab", [24, 5000])
def test_ties_go_to_the_first_token_when_greedy(vocab: int):
    for first in (0, 3, vocab - 2):
        logits = np.zeros(vocab)
        logits[[first, vocab - 1]] = 7.0
        assert next_tokens([logits], [Case(params(temperature=0))])[0] == [first]


def padded(logits: list[float]) -> np.ndarray:
    return np.array(logits + [-np.inf] * (VOCAB - len(logits)))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.1}])
def test_tied_tokens_stay_together(options: dict):
    assert set(draws(padded([2.0, 5.0, 5.0, 5.0, 1.0]), Case(params(**options)))) == {1, 2, 3}


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_p": 0.9, "top_k": 3}, {"min_p": 0.1}])
@pytest.mark.parametrize(
    "logits",
    [
        [-np.inf, -np.inf, 0.0, -np.inf],
        [-3e38, -3e38, 3e38, -3e38],
        [-np.inf, -3e38, -1e38, -np.inf],
        [0.0, 1e4, np.inf, -np.inf],
        [-1e30, -2e30, -1e5, -1e30],
    ],
)
def test_extreme_logits_leave_one_token(options: dict, logits: list[float]):
    assert set(draws(padded(logits), Case(params(**options)))) == {2}


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1e30, 1e300])
def test_extreme_temperatures_are_the_limits_they_tend_to(temperature: float):
    tokens = draws(padded([1.0, 2.0, -np.inf, 1.5]), Case(params(temperature=temperature)))
    assert set(tokens) == ({1} if temperature < 1 else {0, 1, 3})


@pytest.mark.parametrize("options", [{"top_p": 1e-300}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 1}])
def test_extreme_filters_leave_the_likeliest(options: dict):
    assert set(draws(LOGITS, Case(params(**options)))) == {FIRST}


def test_top_k_above_the_vocabulary_keeps_all():
    assert draws(LOGITS, Case(params(top_k=2**40))).tolist() == draws(LOGITS, Case(params())).tolist()


def test_the_state_counts_what_was_sampled_where_it_is_needed():
    cases = [Case(params(presence_penalty=1)), Case(params()), Case(params(frequency_penalty=1))]
    cases = [replace(case, output=(5, 5)) for case in cases]
    tokens, state = next_tokens([LOGITS] * 3, cases, rows=[2, 1, 0])
    expected = np.zeros((SIZE, VOCAB), int)
    for row, token in ((2, tokens[0]), (0, tokens[2])):
        expected[row, 5] = 2
        expected[row, token] += 1
    assert np.asarray(state.tables.output_counts).tolist() == expected.tolist()


def test_rows_past_the_end_change_nothing():
    _, state = next_tokens([LOGITS], [Case(params(presence_penalty=1))], rows=[SIZE - 1])
    before = np.asarray(state.tables.output_counts)
    logits, lengths = jnp.tile(jnp.asarray(LOGITS), (SIZE, 1)), jnp.full(SIZE, 4, jnp.int32)
    _, state = sampler()(
        logits, state, jnp.full(SIZE, SIZE, jnp.int32), lengths, jnp.full((SIZE, WINDOW), -1, jnp.int32)
    )
    assert before.sum() == 1
    assert np.asarray(state.tables.output_counts).tolist() == before.tolist()


def test_penalties_follow_the_tokens_as_they_are_sampled():
    """Of equal logits, each greedy token with a presence penalty is the next one that was not there."""
    config, logits = config_of(VOCAB), jnp.zeros((SIZE, VOCAB))
    settings = Case(params(temperature=0, presence_penalty=2)).settings(config)
    state = load(empty_state(config, SIZE), np.int32(4), settings)
    rows, recent = jnp.array([4] + [SIZE] * (SIZE - 1)), jnp.full((SIZE, WINDOW), -1, jnp.int32)
    seen = []
    for step in range(VOCAB):
        tokens, state = sampler()(logits, state, rows, jnp.full(SIZE, 3 + step, jnp.int32), recent)
        seen.append(int(tokens[0]))
    assert seen == list(range(VOCAB))


def test_a_row_is_free_of_the_request_that_had_it_before():
    config = config_of(VOCAB)
    state = load(empty_state(config, SIZE), np.int32(0), CASES["everything"].settings(config))
    state = load(state, np.int32(0), Case(params(temperature=0)).settings(config))
    logits, rows = jnp.tile(jnp.asarray(LOGITS), (SIZE, 1)), jnp.array([0] + [SIZE] * (SIZE - 1))
    tokens, _ = sampler()(
        logits, state, rows, jnp.full(SIZE, 3, jnp.int32), jnp.full((SIZE, WINDOW), -1, jnp.int32)
    )
    assert tokens[0] == FIRST


def test_bad_words_match_the_output_alone():
    ends = {(): True, (2,): True, (1, 2): False, (4, 1, 2): False, (1, 2, 4): True}
    for output, free in ends.items():
        case = Case(params(temperature=0, bad_words=["x"]), (1, 2), output, bad_words=((1, 2, FIRST),))
        assert (next_tokens([LOGITS], [case])[0] == [FIRST]) == free, output


def test_too_few_recent_tokens_are_refused():
    few = jnp.zeros((SIZE, 2), jnp.int32)
    state, rows = empty_state(config_of(VOCAB), SIZE), jnp.arange(SIZE, dtype=jnp.int32)
    with pytest.raises(ValueError, match="recent has 2 tokens of each row: must be at least 3"):
        jax.eval_shape(sample, jnp.zeros((SIZE, VOCAB)), state, rows, rows, few)


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.floats(0.05, 4),
    top_k=st.integers(0, 30),
    min_p=st.sampled_from([0.0, 0.01, 0.3]),
    repetition=st.sampled_from([1.0, 0.5, 1.9]),
    presence=st.sampled_from([0.0, -2.0, 1.5]),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=6),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=4),
)
def test_a_token_comes_from_the_references_support(
    logits, seed, temperature, top_k, min_p, repetition, presence, output, bias
):
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed or 1,
        "logit_bias": bias,
    }
    case = Case(
        params(repetition_penalty=repetition, presence_penalty=presence, **options), output=tuple(output)
    )
    tokens, _ = next_tokens([np.array(logits)], [case])
    # float32 against float64: what is within a rounding error of the edge may be in or out
    loose = replace(case, params=replace(case.params, min_p=min_p * 0.999, top_k=0))
    support = reference(np.array(logits, np.float32), loose)
    ranked = np.sort(support)[::-1]
    edge = ranked[min(top_k, VOCAB) - 1] if top_k else 0.0
    assert support[tokens[0]] > 0
    assert support[tokens[0]] >= edge * 0.999
