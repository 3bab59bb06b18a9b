"""Beam search: the likeliest outputs of a prompt, rather than samples.

The beams of a prompt grow by a token in each round. A round is one request of one token for every beam of
every prompt; the prefix cache makes it cheap, for all but the last page of a beam has been computed before.

The search is vLLM's: each beam proposes its likeliest tokens, twice as many as there are beams; what ends
with an end-of-sequence token is set aside, and the best of the rest are the next beams. Outputs are ranked as
Hugging Face ranks them, by log probability / output tokens ** length_penalty, the end-of-sequence token
counted (vLLM counts the prompt's tokens too, and not that one).

https://docs.vllm.ai/en/stable/api/vllm/beam_search.html
https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py (`_beam_search`)
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from converters.tokenizer import TextTokenizer
from jaxllm.engine.inputs import EngineInput, InputProcessor
from jaxllm.engine.outputs import Logprob, RequestOutput, SampleLogprobs
from jaxllm.engine.prompts import Prompt
from jaxllm.sampling.params import BeamSearchParams, RequestOutputKind, SamplingParams


@dataclass
class BeamSearchSequence:
    """One output of a beam search, with vLLM's fields."""

    tokens: list[int]
    """The prompt's tokens and the output's, an end-of-sequence token included."""
    logprobs: SampleLogprobs
    """For each output token the candidates it was among, likeliest first, at the search's temperature."""
    cum_logprob: float
    """Log probability of the output: the sum of its tokens' logprobs."""
    score: float
    """What outputs are ranked by: cum_logprob / output tokens ** length_penalty."""
    finish_reason: Literal["stop", "length"]
    """An end-of-sequence token, or the limit on the length."""
    stop_reason: int | None = None
    """The end-of-sequence token that ended it."""
    text: str | None = None
    """All of `tokens` as text, special tokens too, but the one that ended it only with
    `include_stop_str_in_output`; None without a tokenizer."""

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens that follow the prompt."""
        return self.tokens[-len(self.logprobs) :]


@dataclass
class BeamSearchOutput:
    """What a beam search found for one prompt."""

    sequences: list[BeamSearchSequence]
    """As many as there are beams, or all if there are fewer; best first."""


class BeamSearch:
    """Beam search for several prompts, in rounds.

        search = BeamSearch(inputs, prompts, params)
        while requests := search.next_requests():
            search.advance(run(requests))
        search.outputs()

    Args:
        inputs: makes the requests.
        prompts: one or several, as `Engine.generate` takes them.
        params: for all of them.

    Raises:
        ValueError, TypeError: a prompt or parameter that cannot be served.
    """

    def __init__(
        self, inputs: InputProcessor, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> None:
        if not isinstance(params, BeamSearchParams):
            raise TypeError(f"params: must be BeamSearchParams, not {type(params).__name__}")
        eos = frozenset() if params.ignore_eos else inputs.eos_token_ids
        # However many of a beam's candidates end it, as many as there are beams can go on.
        candidates = min(params.beam_width + max(params.beam_width, len(eos)), inputs.vocab_size)
        one_token = SamplingParams(
            temperature=0,
            max_tokens=1,
            logprobs=_num_logprobs(inputs, params, candidates),
            detokenize=inputs.tokenizer is not None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._searches = [
            _PromptSearch(request, params, eos, candidates, inputs.max_model_len)
            for request in inputs.make_batch(prompts, one_token)
        ]
        self._params = params
        self._tokenizer = inputs.tokenizer

    @property
    def max_rounds(self) -> int:
        """Rounds until every output has its most tokens."""
        return max((search.max_tokens for search in self._searches), default=0)

    def next_requests(self) -> list[EngineInput]:
        """The next round's requests; none once all searches have ended."""
        return [request for search in self._searches for request in search.requests()]

    def advance(self, outputs: Sequence[RequestOutput]) -> None:
        """Ends a round with its requests' outputs, in their order."""
        positions = iter([_position(output) for output in outputs])
        for search in self._searches:
            search.advance(list(itertools.islice(positions, len(search.beams))))

    def outputs(self) -> list[BeamSearchOutput]:
        """What was found for each prompt, in their order."""
        return [BeamSearchOutput([self._sequence(s, b) for b in s.finished]) for s in self._searches]

    def _sequence(self, search: "_PromptSearch", beam: "_Beam") -> BeamSearchSequence:
        stopped = beam.tokens[-1] in search.eos_token_ids
        tokens = [*search.request.prompt_token_ids, *beam.tokens]
        return BeamSearchSequence(
            tokens=tokens,
            logprobs=list(beam.logprobs),
            cum_logprob=beam.cum_logprob,
            score=search.score(beam),
            finish_reason="stop" if stopped else "length",
            stop_reason=beam.tokens[-1] if stopped else None,
            text=_text(
                self._tokenizer,
                tokens[:-1] if stopped and not self._params.include_stop_str_in_output else tokens,
            ),
        )


@dataclass(frozen=True, slots=True)
class _Beam:
    """The beginning of an output, or all of it."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] = ()
    cum_logprob: float = 0.0


class _PromptSearch:
    """One prompt's beams."""

    def __init__(
        self,
        request: EngineInput,
        params: BeamSearchParams,
        eos_token_ids: frozenset[int],
        candidates: int,
        max_model_len: int,
    ) -> None:
        self.request = request
        self.eos_token_ids = eos_token_ids
        self.max_tokens = min(params.max_tokens, max_model_len - len(request.prompt_token_ids))
        self.beams = [_Beam()]
        self.finished: list[_Beam] = []
        """The best that have ended, best first."""
        self._params = params
        self._candidates = candidates
        self._check_length_penalty()

    def requests(self) -> list[EngineInput]:
        """A request for each beam's next token."""
        prompt = self.request.prompt_token_ids
        return [dataclasses.replace(self.request, prompt_token_ids=prompt + b.tokens) for b in self.beams]

    def advance(self, positions: Sequence[dict[int, Logprob]]) -> None:
        """Goes on to the next round's beams, given each beam's logprobs of its next token."""
        grown = [
            _Beam((*beam.tokens, token), (*beam.logprobs, chosen), beam.cum_logprob + entry.logprob)
            for beam, position in zip(self.beams, positions, strict=True)
            for chosen in [_likeliest(position, self._candidates, self._params.temperature)]
            for token, entry in chosen.items()
        ]
        going_on = [beam for beam in grown if beam.tokens[-1] not in self.eos_token_ids]
        self.beams = self._best(going_on)
        ended = [beam for beam in grown if beam.tokens[-1] in self.eos_token_ids]
        if self.beams and len(self.beams[0].tokens) == self.max_tokens:
            ended, self.beams = ended + self.beams, []
        self.finished = self._best(self.finished + ended)
        if self._decided():
            self.beams = []

    def score(self, beam: _Beam) -> float:
        """What outputs are ranked by."""
        return beam.cum_logprob / len(beam.tokens) ** self._params.length_penalty

    def _best(self, beams: Sequence[_Beam]) -> list[_Beam]:
        return sorted(beams, key=self.score, reverse=True)[: self._params.beam_width]

    def _decided(self) -> bool:
        """Whether no beam can come before what has ended, however it goes on.

        More tokens only lower the log probability, so the best a beam can become is what it has by now, at
        the shortest or longest length that it may yet have.
        """
        if not self.beams or len(self.finished) < self._params.beam_width:
            return False
        best, penalty = self.beams[0], self._params.length_penalty
        lengths = (len(best.tokens) + 1, self.max_tokens)
        return max(best.cum_logprob / n**penalty for n in lengths) <= self.score(self.finished[-1])

    def _check_length_penalty(self) -> None:
        try:
            math.pow(self.max_tokens, abs(self._params.length_penalty))
        except OverflowError:
            raise ValueError(
                f"length_penalty={self._params.length_penalty}: {self.max_tokens} tokens to this power are "
                "no finite number; choose one nearer to 0"
            ) from None


def _num_logprobs(inputs: InputProcessor, params: BeamSearchParams, candidates: int) -> int:
    """How many logprobs the search has to ask for.

    Raises:
        ValueError: more than the engine gives.
    """
    if params.temperature not in (0, 1):  # its normalizer is a sum over all tokens
        if inputs.max_logprobs < inputs.vocab_size:
            raise ValueError(
                f"temperature={params.temperature}: beam search at another than 0 or 1 needs the logprobs of "
                f"the whole vocabulary, and max_logprobs={inputs.max_logprobs}; make the engine with "
                "max_logprobs=-1, or leave the temperature out"
            )
        return inputs.vocab_size
    if candidates > inputs.max_logprobs:
        raise ValueError(
            f"beam_width={params.beam_width}: needs the logprobs of {candidates} tokens at each step, and "
            f"max_logprobs={inputs.max_logprobs}; choose fewer beams, or make the engine with "
            f"max_logprobs={candidates} (or more)"
        )
    return candidates


def _position(output: RequestOutput) -> dict[int, Logprob]:
    [completion] = output.outputs
    if not completion.logprobs:
        raise ValueError(f"{output.request_id}: its output came without logprobs")
    return completion.logprobs[0]


def _likeliest(position: dict[int, Logprob], count: int, temperature: float) -> dict[int, Logprob]:
    """A position's `count` likeliest tokens, and their logprobs at a temperature (0 and 1 change nothing)."""
    likeliest = sorted(position.items(), key=lambda item: item[1].logprob, reverse=True)[:count]
    if temperature in (0, 1):
        return dict(likeliest)
    scaled = np.array([entry.logprob for entry in position.values()]) / temperature
    normalizer = scaled.max() + np.log(np.exp(scaled - scaled.max()).sum())
    return {
        token: dataclasses.replace(entry, logprob=float(entry.logprob / temperature - normalizer))
        for token, entry in likeliest
    }


def _text(tokenizer: TextTokenizer | None, tokens: Sequence[int]) -> str | None:
    if tokenizer is None:
        return None
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
