"""What a request gives back: vLLM's classes, fields and meanings.

https://docs.vllm.ai/en/stable/api/vllm/outputs.html
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxllm.engine.metrics import RequestMetrics

FinishReason = Literal["stop", "length", "abort", "error"]
"""Why an output ended: a stop token or string, a limit on its length, the caller, or a failed step."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was at a position."""

    logprob: float
    """Natural logarithm of its probability, before temperature, penalties and the like."""
    rank: int | None = None
    """1 for the likeliest token, 2 for the next, ..."""
    decoded_token: str | None = None
    """Its text; "" if it ends in the middle of a character; None without a tokenizer or detokenize."""


SampleLogprobs = list[dict[int, Logprob]]
"""For each output token: the sampled token first, then the likeliest ones."""
PromptLogprobs = list[dict[int, Logprob] | None]
"""For each prompt token; None for the first, which nothing predicts."""


@dataclass
class CompletionOutput:
    """One of a request's outputs.

    With `RequestOutputKind.DELTA`, `text`, `token_ids` and `logprobs` hold what is new since the request's
    last output; else all there is so far.
    """

    index: int
    """Its place among the request's `n` outputs."""
    text: str
    token_ids: Sequence[int]
    """The tokens, a stop token included."""
    cumulative_logprob: float | None
    """Sum of the sampled tokens' logprobs so far; None if logprobs were not asked for."""
    logprobs: SampleLogprobs | None
    finish_reason: FinishReason | None = None
    """None while it goes on."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for another reason, end of sequence included."""

    def finished(self) -> bool:
        """Whether it will not go on."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A request's outputs, finished or so far."""

    request_id: str
    prompt: str | None
    """The prompt's text; None if it was given as token ids."""
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    """None if they were not asked for; with `RequestOutputKind.DELTA` only in one output, the first."""
    outputs: list[CompletionOutput]
    """In order of their index. With `RequestOutputKind.DELTA` only those that have something new."""
    finished: bool
    """Whether all of its outputs have finished."""
    metrics: RequestMetrics | None = None
    """When it arrived, was first scheduled, had its first token, ..."""
    num_cached_tokens: int | None = None
    """Prompt tokens that were found in the prefix cache; None before the request first ran."""
    error: Exception | None = None
    """Why it failed, where that was the request's own fault or is known."""


def join(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Two deltas of one request, the second after the first, as the delta they are together."""
    outputs = {output.index: output for output in first.outputs}
    for output in second.outputs:
        before = outputs.get(output.index)
        outputs[output.index] = output if before is None else _join_samples(before, output)
    return replace(
        second,
        outputs=[outputs[index] for index in sorted(outputs)],
        prompt_logprobs=second.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs,
    )


def _join_samples(first: CompletionOutput, second: CompletionOutput) -> CompletionOutput:
    logprobs = None
    if first.logprobs is not None and second.logprobs is not None:
        logprobs = first.logprobs + second.logprobs
    return replace(
        second,
        text=first.text + second.text,
        token_ids=[*first.token_ids, *second.token_ids],
        logprobs=logprobs,
    )
