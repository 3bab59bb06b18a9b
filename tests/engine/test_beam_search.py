"""Beam search against all outputs there are, a plain search, transformers, and the engine's own scores."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import golden, small_engine
from small_text import EOS, make_tokenizer, text_checkpoint

from jaxllm import BeamSearchParams, Engine
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


# On an engine

ENGINE: dict[str, Any] = {"max_logprobs": -1, "max_model_len": 96, "num_pages": 60, "enforce_eager": True}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A vocabulary of 125 tokens, all of whose logprobs may be asked for."""
    with small_engine("llama", **ENGINE) as made:
        yield made


def prompts() -> list[list[int]]:
    reference = golden("llama")
    return [reference[f"prompt{i}"].tolist() for i in range(2)]


def test_an_engine_finds_the_best_of_all_pairs(engine: Engine) -> None:
    """All 15625 outputs of two tokens, scored on another path: one text for each first token."""
    [prompt] = prompts()[1:]
    params = BeamSearchParams(beam_width=125, max_tokens=2, ignore_eos=True)
    [output] = engine.beam_search([prompt], params)
    assert len(output.sequences) == 125
    texts = [[*prompt, first, 0] for first in range(125)]
    scoring = dataclasses.replace(engine.default_params, max_tokens=1, prompt_logprobs=-1)
    pairs: dict[Tokens, float] = {}
    for first, text in enumerate(engine.generate(texts, scoring)):
        assert text.prompt_logprobs is not None
        before, after = text.prompt_logprobs[-2:]
        assert before is not None
        assert after is not None
        pairs |= {(first, t): before[first].logprob + after[t].logprob for t in range(125)}
    best = sorted(pairs.values(), reverse=True)
    np.testing.assert_allclose([s.cum_logprob for s in output.sequences], best[:125], atol=1e-4)
    for sequence in output.sequences:
        first, second = sequence.output_token_ids
        assert sequence.cum_logprob == pytest.approx(pairs[first, second], abs=1e-4)


def test_found_outputs_are_as_likely_as_scoring_says(engine: Engine) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=10, ignore_eos=True)
    together = engine.beam_search(prompts(), params)
    for prompt, output in zip(prompts(), together, strict=True):
        scores = engine.score([sequence.tokens for sequence in output.sequences])
        for sequence, score in zip(output.sequences, scores, strict=True):
            tail = math.fsum(logprob or 0.0 for logprob in score.logprobs[len(prompt) :])
            assert sequence.cum_logprob == pytest.approx(tail, abs=1e-4)
            assert sequence.score == pytest.approx(tail / 10, abs=1e-5)
            assert sequence.text is None
        [alone] = engine.beam_search(prompt, params)
        assert [s.tokens for s in alone.sequences] == [s.tokens for s in output.sequences]


def test_rounds_find_their_beams_in_the_prefix_cache(engine: Engine) -> None:
    engine.reset_prefix_cache()
    before = engine.get_metrics()["prefix_cache_hits_total"]
    [prompt] = prompts()[:1]
    engine.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=5, ignore_eos=True))
    hits = engine.get_metrics()["prefix_cache_hits_total"] - before
    assert hits >= 8 * (len(prompt) // 4 * 4)  # four rounds of two beams, pages of four tokens


def test_an_engine_shows_its_rounds_and_stays_usable(engine: Engine) -> None:
    made: list[dict[str, Any]] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.options = options | {"count": 0}
            made.append(self.options)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            self.options["closed"] = True

        def update(self) -> None:
            self.options["count"] += 1

    engine.beam_search(prompts(), BeamSearchParams(2, 3, ignore_eos=True), progress=Bar)
    [shown] = made
    assert (shown["total"], shown["unit"], shown["count"], shown["closed"]) == (3, "token", 3, True)
    assert not engine.has_unfinished_requests()


TRANSFORMERS: dict[tuple[int, Tokens], list[tuple[list[int], float]]] = {
    (0, ()): [
        ([77, 64, 40, 7, 64, 67, 84, 119], -1.58625),
        ([77, 64, 40, 7, 64, 67, 84, 113], -1.71253),
        ([77, 64, 107, 119, 40, 92, 32, 64], -1.75196),
    ],
    (1, ()): [
        ([8, 10, 101, 65, 4, 95, 102, 28], -1.86466),
        ([8, 10, 101, 65, 4, 65, 95, 117], -1.89366),
        ([8, 10, 101, 65, 4, 65, 65, 68], -1.9145),
    ],
    (0, tuple(range(40, 51))): [
        ([77, 64, 40], -1.52775),
        ([77, 64, 107, 119, 118, 64, 40], -1.61989),
        ([77, 64, 107, 84, 40], -1.68239),
    ],
}
"""For a prompt and end-of-sequence tokens: output tokens and `sequences_scores` of transformers 5.23's
generate(num_beams=3, num_return_sequences=3, max_new_tokens=8, early_stopping="never") in float32."""


@pytest.mark.parametrize(("row", "eos"), TRANSFORMERS)
def test_transformers_finds_the_same(engine: Engine, row: int, eos: Tokens) -> None:
    inputs = processor(125, max_model_len=96, eos_token_ids=eos)
    beams = BeamSearch(inputs, prompts()[row], BeamSearchParams(beam_width=3, max_tokens=8))
    while requests := beams.next_requests():
        beams.advance(engine._run(requests, progress=False))
    for sequence, (tokens, score) in zip(beams.outputs()[0].sequences, TRANSFORMERS[row, eos], strict=True):
        assert sequence.output_token_ids == tokens
        assert sequence.score == pytest.approx(score, abs=1e-4)


def test_text(tmp_path: Path) -> None:
    """The text holds the prompt and special tokens; the token that ended it only if asked for."""
    tokenizer = make_tokenizer()
    folder = text_checkpoint(tmp_path, generation={"eos_token_id": [EOS, 45, 91]})
    params = BeamSearchParams(beam_width=4, max_tokens=3)
    with small_engine(str(folder), skip_tokenizer_init=False, **ENGINE) as engine:
        [without] = engine.beam_search("hello", params)
        [with_end] = engine.beam_search("hello", dataclasses.replace(params, include_stop_str_in_output=True))
    assert [s.tokens for s in without.sequences] == [s.tokens for s in with_end.sequences]
    assert {s.finish_reason for s in without.sequences} == {"stop", "length"}
    for short, full in zip(without.sequences, with_end.sequences, strict=True):
        assert full.text == tokenizer.decode(full.tokens)
        assert full.text is not None
        assert full.text.startswith("<s>hello")
        ended = short.finish_reason == "stop"
        assert short.text == tokenizer.decode(short.tokens[:-1] if ended else short.tokens)
        chosen = zip(full.output_token_ids, full.logprobs, strict=True)
        shown = [position[token].decoded_token for token, position in chosen]
        assert "".join(text or "" for text in shown) == full.text.removeprefix("<s>hello")
