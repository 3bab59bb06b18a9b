"""How likely a model finds given texts."""

import math
from dataclasses import dataclass

import numpy as np

from jaxllm.engine.outputs import RequestOutput
from jaxllm.sampling.params import RequestOutputKind, SamplingParams

SCORING_PARAMS = SamplingParams(
    temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
)
"""Requests for scores: a request has to sample a token, and it is thrown away."""


@dataclass(frozen=True, slots=True)
class PromptScore:
    """The log probabilities (natural logarithms) of one text's tokens, each given those before it."""

    token_ids: list[int]
    """The text's tokens, those that the tokenizer adds by itself included."""
    logprobs: list[float | None]
    """One for each token; None for the first, which nothing predicts."""

    @property
    def total(self) -> float:
        """The log probability of all tokens but the first, given the first; 0 if there is no other."""
        return math.fsum(logprob for logprob in self.logprobs if logprob is not None)

    @property
    def perplexity(self) -> float:
        """exp(-total / number of predicted tokens); NaN where the text has one token only.

        Source: https://huggingface.co/docs/transformers/perplexity
        """
        predicted = len(self.logprobs) - 1
        if not predicted:
            return math.nan
        with np.errstate(over="ignore"):  # a text this unlikely is infinitely perplexing
            return float(np.exp(-self.total / predicted))


def prompt_score(output: RequestOutput) -> PromptScore:
    """The score that a request with `SCORING_PARAMS` brought back."""
    if output.prompt_logprobs is None:
        raise ValueError(f"{output.request_id}: it has no prompt_logprobs; run it with SCORING_PARAMS")
    positions = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    logprobs = [None if position is None else position[token].logprob for token, position in positions]
    return PromptScore(output.prompt_token_ids, logprobs)
