"""Scores of texts against the reference's logits."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from small import golden, greedy, small_engine

from jaxllm import Engine
from jaxllm.engine.outputs import RequestOutput
from jaxllm.engine.scoring import PromptScore, prompt_score

MODELS = ("llama", "gemma3")


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, dict[str, np.ndarray]]]:
    with small_engine(request.param, max_model_len=96, num_pages=60, enforce_eager=True) as engine:
        yield engine, golden(request.param)


def reference_logprobs(reference: dict[str, np.ndarray], row: int) -> tuple[list[int], np.ndarray]:
    """A parity case's tokens, and the logprobs of all but the first."""
    tokens = np.concatenate([reference[f"prompt{row}"], reference[f"tokens{row}"]])
    logits = reference[f"logits{row}"].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    logprobs -= logits.max(1, keepdims=True)
    return tokens.tolist(), logprobs[np.arange(len(tokens) - 1), tokens[1:]]


def test_scores_are_the_references(case: tuple[Engine, dict[str, np.ndarray]]) -> None:
    engine, reference = case
    texts, expected = zip(*(reference_logprobs(reference, row) for row in range(2)), strict=True)
    for _ in range(2):  # the second time the prefix cache is warm, which must not change anything
        scores = engine.score(list(texts))
        for score, tokens, logprobs in zip(scores, texts, expected, strict=True):
            assert score.token_ids == tokens
            assert score.logprobs[0] is None
            np.testing.assert_allclose(np.array(score.logprobs[1:], float), logprobs, atol=1e-4)
            assert score.total == pytest.approx(logprobs.sum(), abs=1e-3)
            assert score.perplexity == pytest.approx(math.exp(-logprobs.mean()), rel=1e-4)
    assert not engine.has_unfinished_requests()


def test_scoring_beside_other_requests(case: tuple[Engine, dict[str, np.ndarray]]) -> None:
    engine, reference = case
    text, _ = reference_logprobs(reference, 1)
    [alone] = engine.score(text)
    engine.add_request("other", reference["prompt0"].tolist(), greedy(8))
    [beside] = engine.score(text)
    np.testing.assert_allclose(
        np.array(beside.logprobs[1:], float), np.array(alone.logprobs[1:], float), atol=1e-5
    )
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].outputs[0].token_ids == reference["tokens0"][:8].tolist()


def test_what_cannot_be_scored_is_refused(case: tuple[Engine, dict[str, np.ndarray]]) -> None:
    engine, _ = case
    with pytest.raises(ValueError, match=r"prompts\[1\]: .*96 tokens and one more do not fit"):
        engine.score([[5] * 95, [5] * 96])
    with pytest.raises(ValueError, match="prompt: it has no tokens"):
        engine.score([[]])
    [kept] = engine.score([[5] * 96], truncate_prompt_tokens=3)
    assert kept.token_ids == [5, 5, 5]


def test_one_token_has_nothing_to_score(case: tuple[Engine, dict[str, np.ndarray]]) -> None:
    engine, _ = case
    [score] = engine.score([7])
    assert score == PromptScore([7], [None])
    assert score.total == 0
    assert math.isnan(score.perplexity)


def test_the_least_likely_texts_are_infinitely_perplexing() -> None:
    assert PromptScore([1, 2, 3], [None, -500.0, -1e6]).perplexity == math.inf
    assert PromptScore([1, 2, 3], [None, 0.0, -math.log(4)]).perplexity == pytest.approx(2)


def test_an_output_without_logprobs_is_no_score() -> None:
    with pytest.raises(ValueError, match="r1: it has no prompt_logprobs"):
        prompt_score(RequestOutput("r1", None, [1], None, [], True))
