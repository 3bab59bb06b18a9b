"""Custom logits processors change the rows that select them, as numpy would."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import Case, next_tokens

from jaxllm.sampling import (
    SamplerConfig,
    SamplingParams,
    register_logits_processor,
    registered_logits_processors,
    row_settings,
)
from jaxllm.sampling.processors import unregister_logits_processor

VOCAB = 24


@pytest.fixture
def processors():
    """Two processors: one adds to a token, one forbids what the output already has `most` times."""

    @register_logits_processor("boost", parameters={"token": None, "amount": 50.0})
    def boost(logits, token_counts, params):
        hit = jnp.arange(logits.shape[1]) == params["token"][:, None]
        return jnp.where(hit, logits + params["amount"][:, None], logits)

    @register_logits_processor("at most", parameters={"most": 1.0})
    def at_most(logits, token_counts, params):
        return jnp.where(token_counts >= params["most"][:, None], -jnp.inf, logits)

    yield registered_logits_processors()
    unregister_logits_processor("boost")
    unregister_logits_processor("at most")


def greedy(*names: str, **extra: dict) -> SamplingParams:
    return SamplingParams(temperature=0, logits_processors=names, extra_args={n: extra[n] for n in extra})


def test_each_row_gets_the_processors_it_selects(processors):
    logits = np.random.default_rng(0).normal(size=(5, VOCAB))
    cases = [
        Case(greedy()),
        Case(greedy("boost", boost={"token": 7})),
        Case(greedy("boost", boost={"token": 3, "amount": -60})),
        Case(greedy("at most"), output=(*np.argsort(-logits[3])[:3].tolist(),)),
        Case(
            SamplingParams(
                temperature=0,
                logits_processors=["at most", "boost"],
                extra_args={"at most": {"most": 2}, "boost": {"token": 5}},
            ),
            output=(5, 5),
        ),
    ]
    expected = [int(row.argmax()) for row in logits]
    expected[1] = 7
    expected[2] = int(np.delete(logits[2], 3).argmax())
    expected[2] += expected[2] >= 3
    expected[3] = int(np.argsort(-logits[3])[3])
    expected[4] = int(np.where(np.arange(VOCAB) == 5, -np.inf, logits[4]).argmax())
    tokens, state = next_tokens(logits, cases, processors=processors)
    assert tokens == expected
    assert np.asarray(state.tables.output_counts).sum(axis=1).tolist()[:5] == [0, 1, 1, 4, 3]


def test_a_processor_that_breaks_other_rows_breaks_only_its_own(processors):
    @register_logits_processor("nan")
    def nan(logits, token_counts, params):
        return logits * jnp.nan

    logits = np.random.default_rng(0).normal(size=(2, VOCAB))
    cases = [Case(greedy()), Case(SamplingParams(temperature=0, logits_processors=["nan"]))]
    try:
        tokens, _ = next_tokens(logits, cases, processors=registered_logits_processors())
    finally:
        unregister_logits_processor("nan")
    assert tokens[0] == logits[0].argmax()
    assert 0 <= tokens[1] < VOCAB


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (greedy("missing"), "logits_processors='missing'.*boost"),
        (greedy("boost"), "lacks 'token'"),
        (greedy("boost", boost={"token": 1, "size": 2}), "has 'size'"),
    ],
)
def test_what_is_unknown_or_missing_is_refused(processors, params: SamplingParams, message: str):
    with pytest.raises(ValueError, match=message):
        row_settings(SamplerConfig(VOCAB, processors=processors), params, seed=0, prompt_token_ids=[1])


def test_a_name_is_registered_once(processors):
    with pytest.raises(ValueError, match="already registered"):
        register_logits_processor("boost")(lambda logits, token_counts, params: logits)
    with pytest.raises(KeyError, match="nothing"):
        unregister_logits_processor("nothing")


def test_a_result_of_another_shape_is_refused():
    register_logits_processor("wide")(lambda logits, token_counts, params: logits[:, :-1])
    try:
        with pytest.raises(ValueError, match=re.escape("'wide' returned shape")):
            next_tokens(
                np.zeros((1, VOCAB)), [Case(greedy("wide"))], processors=registered_logits_processors()
            )
    finally:
        unregister_logits_processor("wide")
