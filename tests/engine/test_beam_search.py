"""Beam search on chains of random numbers, against all outputs there are and a plain search."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import BeamSearchParams
from jaxllm.engine.beam_search import BeamSearch, BeamSearchOutput
from jaxllm.engine.inputs import EngineInput, InputProcessor
from jaxllm.engine.outputs import CompletionOutput, Logprob, RequestOutput

Tokens = tuple[int, ...]


class Chain:
    """A model of a few tokens whose logits are random numbers drawn for each beginning of a text."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self.seed, self.vocab_size = seed, vocab_size
        self.num_requests = 0

    def logprobs(self, tokens: Tokens, temperature: float = 1.0) -> np.ndarray:
        logits = np.random.default_rng([self.seed, *tokens]).normal(0, 2, self.vocab_size) / temperature
        return logits - np.log(np.exp(logits).sum())

    def run(self, requests: Sequence[EngineInput]) -> list[RequestOutput]:
        self.num_requests += len(requests)
        return [self._answer(request) for request in requests]

    def _answer(self, request: EngineInput) -> RequestOutput:
        logprobs = self.logprobs(request.prompt_token_ids)
        assert request.params.greedy
        assert request.max_tokens == 1
        likeliest = np.argsort(-logprobs, kind="stable")[: request.num_logprobs]
        position = {int(t): Logprob(float(logprobs[t]), rank) for rank, t in enumerate(likeliest, start=1)}
        [*_, token] = likeliest[:1].tolist()
        completion = CompletionOutput(0, "", [token], float(logprobs[token]), [position], "length")
        return RequestOutput("", None, list(request.prompt_token_ids), None, [completion], True)


def processor(
    vocab_size: int, *, max_model_len: int = 100, max_logprobs: int = -1, eos_token_ids: Collection[int] = ()
) -> InputProcessor:
    return InputProcessor(
        None,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        max_logprobs=max_logprobs,
        eos_token_ids=eos_token_ids,
    )


def search(
    model: Chain, prompts: list[list[int]], params: BeamSearchParams, **options: Any
) -> list[BeamSearchOutput]:
    """Beam search on a chain."""
    beams = BeamSearch(processor(model.vocab_size, **options), prompts, params)
    rounds = 0
    while requests := beams.next_requests():
        beams.advance(model.run(requests))
        rounds += 1
    assert rounds <= beams.max_rounds
    return beams.outputs()


def found(output: BeamSearchOutput) -> list[tuple[Tokens, float]]:
    return [(tuple(s.output_token_ids), s.score) for s in output.sequences]


def assert_same(got: list[tuple[Tokens, float]], expected: list[tuple[Tokens, float]]) -> None:
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([score for _, score in got], [score for _, score in expected], rtol=1e-6)


def all_outputs(
    model: Chain, prompt: Tokens, params: BeamSearchParams, eos: frozenset[int]
) -> Iterator[tuple[Tokens, float]]:
    """Every output there is, with its log probability."""
    pending: list[tuple[Tokens, float]] = [((), 0.0)]
    while pending:
        tokens, total = pending.pop()
        ended = tokens and not params.ignore_eos and tokens[-1] in eos
        if ended or len(tokens) == params.max_tokens:
            yield tokens, total
        else:
            logprobs = model.logprobs(prompt + tokens, params.temperature or 1.0)
            pending += [
                ((*tokens, token), total + float(logprobs[token])) for token in range(model.vocab_size)
            ]


def ranked(
    outputs: Iterator[tuple[Tokens, float]] | list[tuple[Tokens, float]], params: BeamSearchParams
) -> list[tuple[Tokens, float]]:
    scored = [(tokens, total / len(tokens) ** params.length_penalty) for tokens, total in outputs]
    return sorted(scored, key=lambda pair: -pair[1])[: params.beam_width]


def plain_search(
    model: Chain, prompt: Tokens, params: BeamSearchParams, eos: frozenset[int]
) -> list[tuple[Tokens, float]]:
    """Beam search without a way to end early, and every token a candidate."""
    eos = frozenset() if params.ignore_eos else eos
    beams: list[tuple[Tokens, float]] = [((), 0.0)]
    ended: list[tuple[Tokens, float]] = []
    candidates = params.beam_width + max(params.beam_width, len(eos))
    for _ in range(params.max_tokens):
        grown: list[tuple[Tokens, float]] = []
        for tokens, total in beams:
            logprobs = model.logprobs(prompt + tokens, params.temperature or 1.0)
            likeliest = np.argsort(-logprobs, kind="stable")[:candidates].tolist()
            grown += [((*tokens, token), total + float(logprobs[token])) for token in likeliest]
        ended += [(tokens, total) for tokens, total in grown if tokens[-1] in eos]
        going_on = [(tokens, total) for tokens, total in grown if tokens[-1] not in eos]
        beams = sorted(going_on, key=lambda beam: -beam[1])[: params.beam_width]
    return ranked(ended + beams, params)


EOS_SETS = st.sampled_from([frozenset[int](), frozenset({0}), frozenset({1, 2})])
OPTIONS = st.fixed_dictionaries(
    {
        "length_penalty": st.sampled_from([1.0, 0.0, 2.5, -1.0]),
        "ignore_eos": st.booleans(),
        "temperature": st.sampled_from([0.0, 1.0, 0.5, 3.0]),
    }
)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), eos=EOS_SETS, max_tokens=st.integers(1, 3), options=OPTIONS)
def test_enough_beams_find_the_best_of_all_outputs(
    seed: int, eos: frozenset[int], max_tokens: int, options: dict[str, Any]
) -> None:
    model = Chain(seed, 4)
    params = BeamSearchParams(beam_width=64, max_tokens=max_tokens, **options)
    [output] = search(model, [[1, 2]], params, eos_token_ids=eos)
    assert_same(found(output), ranked(all_outputs(model, (1, 2), params, eos), params))


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    eos=EOS_SETS,
    width=st.integers(1, 4),
    max_tokens=st.integers(1, 9),
    options=OPTIONS,
)
def test_few_beams_find_what_a_plain_search_finds(
    seed: int, eos: frozenset[int], width: int, max_tokens: int, options: dict[str, Any]
) -> None:
    """Prompts are searched side by side, and each search ends as soon as its outcome is certain."""
    model = Chain(seed, 7)
    params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, **options)
    prompts = [[3], [1, 5, 6], [4, 4]]
    outputs = search(model, prompts, params, eos_token_ids=eos)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_same(found(output), plain_search(model, tuple(prompt), params, eos))
        for sequence in output.sequences:
            chosen = zip(sequence.output_token_ids, sequence.logprobs, strict=True)
            total = math.fsum(position[token].logprob for token, position in chosen)
            assert sequence.cum_logprob == pytest.approx(total)
            assert sequence.tokens[: len(prompt)] == prompt


def test_a_search_ends_when_nothing_better_can_come() -> None:
    """At 0 a length costs nothing, so a likely output that has ended cannot be overtaken."""
    model = Chain(0, 2)
    model.logprobs = lambda tokens, temperature=1.0: np.log([0.9, 0.1])
    params = BeamSearchParams(beam_width=1, max_tokens=50, length_penalty=0.0)
    [output] = search(model, [[1]], params, eos_token_ids=[0])
    assert found(output) == [((0,), pytest.approx(math.log(0.9)))]
    assert model.num_requests == 1
    longer = dataclasses.replace(params, length_penalty=4.0)  # now 50 tokens might come first
    [output] = search(model, [[1]], longer, eos_token_ids=[0])
    assert model.num_requests == 51


def test_the_length_penalty_chooses_between_short_and_long() -> None:
    """Two outputs: one token of probability 0.6, or three of 0.4, 0.9 and 0.9."""
    model = Chain(0, 2)
    model.logprobs = lambda tokens, temperature=1.0: np.log([0.6, 0.4] if len(tokens) == 1 else [1e-9, 0.9])
    best = {}
    for penalty in (-1.0, 0.0, 1.0):
        params = BeamSearchParams(beam_width=2, max_tokens=3, length_penalty=penalty)
        [output] = search(model, [[1]], params, eos_token_ids=[0])
        best[penalty] = output.sequences[0]
    assert [len(sequence.output_token_ids) for sequence in best.values()] == [1, 1, 3]
    assert best[1.0].score == pytest.approx(math.log(0.4 * 0.9 * 0.9) / 3)
    assert best[-1.0].score == pytest.approx(math.log(0.6))


def test_end_of_sequence() -> None:
    model = Chain(1, 5)
    params = BeamSearchParams(beam_width=3, max_tokens=4)
    [output] = search(model, [[1]], params, eos_token_ids=[0, 2])
    assert {s.finish_reason for s in output.sequences} == {"stop", "length"}
    for sequence in output.sequences:
        *before, last = sequence.output_token_ids
        assert not {0, 2} & set(before)
        if last in (0, 2):
            assert (sequence.finish_reason, sequence.stop_reason) == ("stop", last)
        else:
            assert (sequence.finish_reason, sequence.stop_reason) == ("length", None)
            assert len(sequence.output_token_ids) == 4
    [ignored] = search(model, [[1]], dataclasses.replace(params, ignore_eos=True), eos_token_ids=[0, 2])
    assert all(len(s.output_token_ids) == 4 and s.finish_reason == "length" for s in ignored.sequences)
    assert any({0, 2} & set(s.output_token_ids) for s in ignored.sequences)


def test_all_tokens_may_end_a_beam() -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=9)
    [output] = search(Chain(0, 3), [[1]], params, eos_token_ids=[0, 1, 2])
    assert [len(sequence.output_token_ids) for sequence in output.sequences] == [1, 1]


def test_more_ends_of_sequence_than_beams_leave_a_beam_to_go_on() -> None:
    """The three likeliest tokens end the only beam; the fourth goes on."""
    model = Chain(0, 6)
    model.logprobs = lambda tokens, temperature=1.0: np.log([0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
    params = BeamSearchParams(beam_width=1, max_tokens=3, length_penalty=9.0)
    [output] = search(model, [[1]], params, eos_token_ids=[0, 1, 2])
    assert output.sequences[0].output_token_ids == [3, 3, 0]


def test_outputs_end_where_the_models_length_ends() -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=9)
    long, short = search(Chain(0, 5), [[1] * 7, [1, 2]], params, max_model_len=10)
    assert {len(s.output_token_ids) for s in long.sequences} == {3}
    assert {len(s.output_token_ids) for s in short.sequences} == {8}


def test_no_prompts_have_no_outputs() -> None:
    assert search(Chain(0, 5), [], BeamSearchParams(beam_width=2, max_tokens=9)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_width": 11}, r"beam_width=11: .*22 tokens.*max_logprobs=20; choose fewer.*max_logprobs=22"),
        ({"temperature": 0.5}, r"temperature=0.5: .*max_logprobs=20; make the engine with max_logprobs=-1"),
        ({"length_penalty": -400.0}, r"length_penalty=-400.0: 8 tokens .* choose one nearer to 0"),
    ],
)
def test_what_cannot_be_served_is_refused(options: dict[str, Any], message: str) -> None:
    params = dataclasses.replace(BeamSearchParams(beam_width=10, max_tokens=8), **options)
    with pytest.raises(ValueError, match=message):
        BeamSearch(processor(30, max_logprobs=20), [1], params)


def test_prompts_and_parameters_are_checked() -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=8)
    with pytest.raises(ValueError, match=r"prompts\[1\]: .*30 not in the model's vocabulary"):
        BeamSearch(processor(30), [[1], [30]], params)
    with pytest.raises(TypeError, match="params: must be BeamSearchParams, not dict"):
        BeamSearch(processor(30), [1], {"beam_width": 2})  # pyright: ignore[reportArgumentType]


def test_requests_keep_the_cache_salt_of_their_prompt() -> None:
    beams = BeamSearch(
        processor(30),
        {"prompt_token_ids": [1], "cache_salt": "tenant"},
        BeamSearchParams(beam_width=2, max_tokens=8),
    )
    assert [request.cache_salt for request in beams.next_requests()] == ["tenant"]
