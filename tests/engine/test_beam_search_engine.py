"""Beam search on an engine, against all outputs there are, transformers, and the engine's own scores."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import golden, small_engine
from small_text import EOS, make_tokenizer, text_checkpoint

from jaxllm import BeamSearchParams, Engine
from jaxllm.engine.beam_search import BeamSearch
from jaxllm.engine.inputs import InputProcessor

Tokens = tuple[int, ...]

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
    inputs = InputProcessor(None, vocab_size=125, max_model_len=96, max_logprobs=-1, eos_token_ids=eos)
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
