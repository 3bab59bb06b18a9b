"""A request's outputs put together, from the tokens that its samples bring in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxllm.engine.detokenizer import Detokenizer
from jaxllm.engine.inputs import EngineInput
from jaxllm.engine.metrics import RequestMetrics
from jaxllm.engine.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    PromptLogprobs,
    RequestOutput,
    SampleLogprobs,
)
from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.sampling.params import RequestOutputKind


class TokenLogprobs(NamedTuple):
    """Log probabilities at one position, as they come from the device."""

    logprob: float
    """Of the position's own token."""
    rank: int
    """Of the position's own token, from 1."""
    top_ids: Sequence[int]
    """The likeliest tokens, likeliest first."""
    top_logprobs: Sequence[float]


class OutputAssembler:
    """Puts one request's `RequestOutput`s together, its `n` samples' among them in order of their index.

    Args:
        request_id: the caller's name for the request.
        input: the request.
        vocabulary: what the tokens say; None if there is no tokenizer.

    Raises:
        ValueError: the input wants text, and there is no vocabulary to make it with.
    """

    def __init__(self, request_id: str, input: EngineInput, vocabulary: Vocabulary | None) -> None:
        self.request_id = request_id
        self.input = input
        self.metrics: RequestMetrics | None = None
        """Set by whoever counts the request; given out with each output."""
        self.error: Exception | None = None
        """Set by whoever ends the request because of it."""
        self.num_cached_tokens: int | None = None
        """Set by whoever schedules the request."""
        self._vocabulary = vocabulary if input.params.detokenize else None
        self._kind = input.params.output_kind
        self._samples = [
            _Sample(index, input, self._vocabulary, self._new_detokenizer())
            for index in range(input.params.n)
        ]
        self._unfinished = len(self._samples)
        self._prompt_token_ids = list(input.prompt_token_ids)  # one copy, shared by all outputs
        self._prompt_logprobs: PromptLogprobs | None = None
        self._prompt_bytes = b""
        if input.num_prompt_logprobs is not None:
            self._prompt_logprobs = [None]
            self._prompt_bytes = self._unfinished_bytes(b"", input.prompt_token_ids[0])
        self._finish_taken = False

    @property
    def finished(self) -> bool:
        """Whether all samples have finished."""
        return not self._unfinished

    @property
    def num_scored(self) -> int:
        """Leading prompt tokens whose logprobs are there, the first, which has none, included."""
        return len(self._prompt_token_ids if self._prompt_logprobs is None else self._prompt_logprobs)

    def token_ids(self, index: int) -> Sequence[int]:
        """The tokens that a sample has got so far."""
        return self._samples[index].token_ids

    def add_tokens(
        self,
        index: int,
        token_ids: Sequence[int],
        *,
        logprobs: Sequence[TokenLogprobs] | None = None,
        finish_reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
        stop_token: bool | None = None,
    ) -> str | None:
        """Adds a sample's next tokens.

        Args:
            index: which of the request's `n` samples.
            token_ids: the tokens; a stop token, if one was sampled, is the last.
            logprobs: one for each token, if the request asked for logprobs.
            finish_reason: given if the sample ends with these tokens.
            stop_reason: the stop token's id, unless it is the end of sequence.
            stop_token: whether the last token ended the sample and is no part of its text; by default if the
                finish reason is "stop".

        Returns:
            The stop string that these tokens complete, or None. The sample has then finished (tokens after
            it are dropped, and so is the given finish reason): the caller only has to free what it holds.

        Raises:
            RuntimeError: the sample has finished already.
        """
        sample = self._samples[index]
        if sample.finish_reason is not None:
            raise RuntimeError(
                f"request {self.request_id!r}: sample {index} gets tokens after it has finished"
            )
        if stop_token is None:
            stop_token = finish_reason == "stop"
        stop = sample.add(token_ids, logprobs, stop_token=stop_token)
        if stop is not None:
            finish_reason, stop_reason = "stop", stop
        if finish_reason is not None:
            self._finish(sample, finish_reason, stop_reason)
        return stop

    def add_prompt_logprobs(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """Adds the logprobs of the next prompt tokens, beginning with the second (the first has none)."""
        if self._prompt_logprobs is None:
            raise RuntimeError(f"request {self.request_id!r} did not ask for prompt_logprobs")
        for position in logprobs:
            token_id = self.input.prompt_token_ids[len(self._prompt_logprobs)]
            count = self.input.num_prompt_logprobs or 0
            self._prompt_logprobs.append(
                _named(position, token_id, count, self._vocabulary, self._prompt_bytes)
            )
            self._prompt_bytes = self._unfinished_bytes(self._prompt_bytes, token_id)

    def abort(self, reason: FinishReason = "abort") -> None:
        """Ends the samples that go on; what they have is given out by the next `take`."""
        for sample in self._samples:
            if sample.finish_reason is None:
                self._finish(sample, reason, None)

    def take(self) -> RequestOutput | None:
        """The request's next output, of the kind it asked for; None if there is nothing to give out.

        Cumulative outputs hold all samples, deltas those with something new, and a final output comes once.
        """
        finished, delta = not self._unfinished, self._kind is RequestOutputKind.DELTA
        if self._finish_taken or (self._kind is RequestOutputKind.FINAL_ONLY and not finished):
            return None
        changed = [sample for sample in self._samples if sample.changed]
        if not changed:
            return None
        outputs = [sample.output(delta=delta) for sample in (changed if delta else self._samples)]
        prompt_logprobs = self._take_prompt_logprobs()
        self._finish_taken = finished
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.input.prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=outputs,
            finished=finished,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
            error=self.error,
        )

    def _take_prompt_logprobs(self) -> PromptLogprobs | None:
        """The prompt's logprobs once all are known; in deltas only once."""
        found = self._prompt_logprobs
        if found is None or (len(found) < len(self._prompt_token_ids) and not self.finished):
            return None
        if self._kind is RequestOutputKind.DELTA:
            self._prompt_logprobs = None
        return found

    def _finish(self, sample: "_Sample", reason: FinishReason, stop_reason: int | str | None) -> None:
        sample.finish_reason, sample.stop_reason, sample.changed = reason, stop_reason, True
        if sample.detokenizer is not None:
            sample.detokenizer.finish()
        self._unfinished -= 1

    def _new_detokenizer(self) -> Detokenizer | None:
        params = self.input.params
        if not params.detokenize:
            return None
        if self._vocabulary is None:
            raise ValueError(
                "detokenize=True: there is no tokenizer to make text with; pass detokenize=False"
            )
        return Detokenizer(
            self._vocabulary,
            self.input.prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            stop=tuple(params.stop or ()),
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def _unfinished_bytes(self, unfinished: bytes, token_id: int) -> bytes:
        return b"" if self._vocabulary is None else self._vocabulary.unfinished((token_id,), unfinished)


@dataclass(slots=True)
class _Sample:
    """One of the request's outputs as it grows."""

    index: int
    input: EngineInput
    vocabulary: Vocabulary | None
    detokenizer: Detokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: SampleLogprobs = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    changed: bool = False
    """Whether there is something that no output has given out."""
    num_taken: int = 0
    """Tokens given out in deltas."""

    def add(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None, *, stop_token: bool
    ) -> str | None:
        """Adds tokens up to the first that completes a stop string, and returns that string."""
        count = self.input.num_logprobs
        if count is not None and (logprobs is None or len(logprobs) != len(token_ids)):
            raise ValueError(f"sample {self.index}: {len(token_ids)} tokens came without as many logprobs")
        for i, token_id in enumerate(token_ids):
            self.changed = True
            self.token_ids.append(token_id)
            if count is not None and logprobs is not None:
                unfinished = b"" if self.detokenizer is None else self.detokenizer.unfinished
                self.logprobs.append(_named(logprobs[i], token_id, count, self.vocabulary, unfinished))
                self.cumulative_logprob += logprobs[i].logprob
            if self.detokenizer is not None:
                stop = self.detokenizer.update((token_id,), stop_token=stop_token and i == len(token_ids) - 1)
                if stop is not None:
                    return stop
        return None

    def output(self, *, delta: bool) -> CompletionOutput:
        """What there is, or what is new since the last delta."""
        start = self.num_taken if delta else 0
        text = ""
        if self.detokenizer is not None:
            text = self.detokenizer.take_delta() if delta else self.detokenizer.text
        self.num_taken, self.changed = len(self.token_ids), False
        wanted = self.input.num_logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=self.token_ids[start:],
            cumulative_logprob=self.cumulative_logprob if wanted else None,
            logprobs=self.logprobs[start:] if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def _named(
    position: TokenLogprobs, token_id: int, count: int, vocabulary: Vocabulary | None, unfinished: bytes
) -> dict[int, Logprob]:
    """A position's logprobs by token id: its own token first, then the `count` likeliest."""

    def entry(token: int, logprob: float, rank: int) -> Logprob:
        text = None if vocabulary is None else vocabulary.decode_token(token, unfinished)
        return Logprob(float(logprob), int(rank), text)

    named = {token_id: entry(token_id, position.logprob, position.rank)}
    top = zip(position.top_ids[:count], position.top_logprobs[:count], strict=True)
    for rank, (token, logprob) in enumerate(top, start=1):
        if int(token) != token_id:  # its own rank counts ties as the sampler does
            named[int(token)] = entry(int(token), logprob, rank)
    return named
