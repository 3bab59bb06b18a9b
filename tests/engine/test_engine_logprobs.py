"""Logprobs that requests bring back, held to the reference's log-softmax of the golden logits."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import golden, greedy, small_engine
from small_text import text_checkpoint

from jaxllm import Engine, RequestOutput, RequestOutputKind, SamplingParams
from jaxllm.engine.outputs import Logprob

TOLERANCE = 1e-4
VOCABULARY = 125
STEPS = 16
SIZES: dict[str, Any] = {"max_model_len": 96, "num_pages": 60, "max_logprobs": -1, "enforce_eager": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "chunked, asynchronous, cached": {},
    "synchronous": {"async_scheduling": False, "enable_prefix_caching": False},
    "chunks of 8": {"max_num_batched_tokens": 8, "num_pages": 30},
    "fewer pages": {"num_pages": 40},
}
"""Few pages: six of the requests below need 90."""
CASES = [
    ("llama", "chunked, asynchronous, cached"),
    ("llama", "synchronous"),
    ("llama", "chunks of 8"),
    ("gemma2", "fewer pages"),  # has sliding layers, and its logits are capped
]


@functools.cache
def _engine(model: str, variant: str) -> Engine:
    return small_engine(model, **(SIZES | VARIANTS[variant]))


@pytest.fixture(scope="module", autouse=True)
def engines() -> Iterator[None]:
    yield
    _engine.cache_clear()


@functools.cache
def reference(model: str, row: int) -> tuple[list[int], list[int], np.ndarray]:
    """A golden prompt, its greedy tokens, and the log-softmax after each of the tokens."""
    arrays = golden(model)
    logits = arrays[f"logits{row}"].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return arrays[f"prompt{row}"].tolist(), arrays[f"tokens{row}"].tolist(), logprobs


def check(entries: Sequence[dict[int, Logprob] | None], tokens: list[int], logprobs: np.ndarray, k: int):
    """Each position has its own token first and then the `k` likeliest, with their logprobs and ranks."""
    assert len(entries) == len(tokens) == len(logprobs)
    for entry, token, expected in zip(entries, tokens, logprobs, strict=True):
        assert entry is not None
        order = np.argsort(-expected, kind="stable")
        assert next(iter(entry)) == token
        assert set(entry) == {token, *order[:k].tolist()}
        for other, found in entry.items():
            assert abs(found.logprob - expected[other]) <= TOLERANCE
            likelier, as_likely = (expected > expected[other] + d for d in (TOLERANCE, -TOLERANCE))
            assert 1 + likelier.sum() <= found.rank <= as_likely.sum()
            assert found.decoded_token is None


def check_request(output: RequestOutput, model: str, row: int, k: int, prompt_k: int | None) -> None:
    prompt, tokens, logprobs = reference(model, row)
    [sample] = output.outputs
    assert output.prompt_token_ids == prompt
    assert sample.token_ids == tokens
    assert sample.logprobs is not None
    own = logprobs[len(prompt) - 1 : -1]
    check(sample.logprobs, tokens, own, k)
    total = own[np.arange(STEPS), tokens].sum()
    assert sample.cumulative_logprob == pytest.approx(total, abs=STEPS * TOLERANCE)
    if prompt_k is None:
        assert output.prompt_logprobs is None
    else:
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        check(output.prompt_logprobs[1:], prompt[1:], logprobs[: len(prompt) - 1], prompt_k)


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_alone_and_in_a_crowd(model: str, variant: str) -> None:
    """Many at once on few pages: prompts come in chunks, and requests are preempted and resume."""
    engine = _engine(model, variant)
    kinds: list[tuple[int, int, int | None]] = [(0, 3, 2), (1, 0, 0), (0, 5, None), (1, 1, 4)] * 3
    prompts = [reference(model, row)[0] for row, _, _ in kinds]
    params = [greedy(STEPS, logprobs=k, prompt_logprobs=prompt_k) for _, k, prompt_k in kinds]
    before = engine.get_metrics()["preemptions_total"]
    outputs = engine.generate(prompts, params)
    for output, kind in zip(outputs, kinds, strict=True):
        check_request(output, model, *kind)
    assert engine.get_metrics()["preemptions_total"] > before
    for kind in kinds[:3]:
        [output] = engine.generate(
            [reference(model, kind[0])[0]], greedy(STEPS, logprobs=kind[1], prompt_logprobs=kind[2])
        )
        check_request(output, model, *kind)


def test_a_warm_prefix_cache() -> None:
    """Logprobs of outputs do not need the prompt to be computed; those of prompts do."""
    engine = _engine("llama", "chunked, asynchronous, cached")
    prompt = reference("llama", 0)[0]
    engine.generate([prompt], greedy(1))
    [warm] = engine.generate([prompt], greedy(STEPS, logprobs=2))
    assert warm.num_cached_tokens == 40
    check_request(warm, "llama", 0, 2, None)
    [scored] = engine.generate([prompt], greedy(STEPS, logprobs=2, prompt_logprobs=1))
    assert scored.num_cached_tokens == 0
    check_request(scored, "llama", 0, 2, 1)


def test_the_whole_vocabulary() -> None:
    engine = _engine("llama", "chunked, asynchronous, cached")
    [output] = engine.generate([reference("llama", 0)[0]], greedy(STEPS, logprobs=-1, prompt_logprobs=-1))
    check_request(output, "llama", 0, VOCABULARY, VOCABULARY)
    assert output.outputs[0].logprobs is not None
    for entry in output.outputs[0].logprobs:
        assert sum(np.exp(found.logprob) for found in entry.values()) == pytest.approx(1, abs=1e-4)


def test_they_are_the_models_own() -> None:
    """Temperature, penalties and the like change what is sampled, and not the logprobs that are told."""
    engine = _engine("llama", "chunked, asynchronous, cached")
    prompt, _, logprobs = reference("llama", 0)
    shaped = [
        SamplingParams(temperature=3.0, seed=1, max_tokens=1, logprobs=4, detokenize=False),
        SamplingParams(
            temperature=0, max_tokens=1, logprobs=4, logit_bias={9: 50}, presence_penalty=2, detokenize=False
        ),
        SamplingParams(
            seed=2, max_tokens=1, logprobs=4, allowed_token_ids=[30, 31], top_k=1, detokenize=False
        ),
    ]
    sampled = set()
    for output in engine.generate([prompt] * 3, shaped):
        [sample] = output.outputs
        assert sample.logprobs is not None
        check(sample.logprobs, list(sample.token_ids), logprobs[len(prompt) - 1 : len(prompt)], 4)
        sampled |= set(sample.token_ids)
    assert 9 in sampled
    assert sampled & {30, 31}


def test_scoring_agrees_with_sampling() -> None:
    """What was sampled, given back as a prompt, has the logprobs that it was sampled with."""
    engine = _engine("llama", "chunked, asynchronous, cached")
    prompt = reference("llama", 1)[0]
    params = SamplingParams(seed=5, max_tokens=20, logprobs=0, ignore_eos=True, detokenize=False)
    [sample] = engine.generate([prompt], params)[0].outputs
    [scored] = engine.generate([[*prompt, *sample.token_ids]], greedy(1, prompt_logprobs=0))
    assert sample.logprobs is not None
    assert scored.prompt_logprobs is not None
    for i, token in enumerate(sample.token_ids):
        entry = scored.prompt_logprobs[len(prompt) + i]
        assert entry is not None
        assert entry[token].logprob == pytest.approx(sample.logprobs[i][token].logprob, abs=TOLERANCE)
        assert entry[token].rank == sample.logprobs[i][token].rank


def test_prompt_logprobs_of_several_samples_and_of_streams() -> None:
    engine = _engine("llama", "chunked, asynchronous, cached")
    prompt, _, logprobs = reference("llama", 0)
    params = SamplingParams(n=3, seed=1, max_tokens=4, prompt_logprobs=2, logprobs=1, detokenize=False)
    [output] = engine.generate([prompt], params)
    assert output.prompt_logprobs is not None
    check(output.prompt_logprobs[1:], prompt[1:], logprobs[: len(prompt) - 1], 2)
    assert all(len(sample.logprobs or ()) == len(sample.token_ids) == 4 for sample in output.outputs)
    params = dataclasses.replace(params, n=1, output_kind=RequestOutputKind.DELTA)
    deltas = list(engine.stream(prompt, params))
    assert [delta.prompt_logprobs is not None for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert deltas[0].prompt_logprobs == output.prompt_logprobs


def test_a_prompt_of_one_token() -> None:
    engine = _engine("llama", "chunked, asynchronous, cached")
    [output] = engine.generate([[7]], greedy(2, prompt_logprobs=1, logprobs=1))
    assert output.prompt_logprobs == [None]
    assert len(output.outputs[0].logprobs or ()) == 2


def test_not_asked_for() -> None:
    [output] = _engine("llama", "chunked, asynchronous, cached").generate([[7, 8, 9]], greedy(2))
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_more_than_the_engine_gives_is_refused() -> None:
    with small_engine(**(SIZES | {"max_logprobs": 2})) as engine:
        for name in ("logprobs", "prompt_logprobs"):
            for count in (3, -1):
                with pytest.raises(ValueError, match=rf"^{name}={count}: at most 2 .*max_logprobs"):
                    engine.generate([[7]], greedy(1, **{name: count}))


def test_decoded_tokens(tmp_path: Path) -> None:
    prompt, tokens, _ = reference("llama", 0)
    with small_engine(str(text_checkpoint(tmp_path)), skip_tokenizer_init=False, **SIZES) as engine:
        params = dataclasses.replace(greedy(4, logprobs=2, prompt_logprobs=2), detokenize=True)
        [output] = engine.generate([prompt], params)
        tokenizer = engine.get_tokenizer()
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    for entry in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs):
        assert entry is not None
        assert {token: found.decoded_token for token, found in entry.items()} == {
            token: tokenizer.decode([token]) for token in entry
        }
    assert output.outputs[0].token_ids == tokens[:4]
