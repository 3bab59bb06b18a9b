"""Requests that have not given out their last output."""

from collections.abc import Iterator, Sequence

from jaxllm.engine.sample import Sample


class Unfinished:
    """Such requests by their ids, and their samples by the names that the scheduler knows them by.

    Attributes:
        samples: by name.
    """

    def __init__(self) -> None:
        self.samples: dict[str, Sample] = {}
        self._requests: dict[str, list[Sample]] = {}
        self._scored: set[str] = set()
        self._constrained: set[str] = set()
        self._with_logprobs: set[str] = set()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[str]:
        return iter(self._requests)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    @property
    def any_scored(self) -> bool:
        """Whether a request wants its prompt's logprobs."""
        return bool(self._scored)

    @property
    def any_constrained(self) -> bool:
        """Whether a request is held to a grammar."""
        return bool(self._constrained)

    @property
    def any_logprobs(self) -> bool:
        """Whether a request wants logprobs of what is sampled for it."""
        return bool(self._with_logprobs)

    def add(self, samples: Sequence[Sample]) -> None:
        """Takes a request, all of its samples.

        Raises:
            ValueError: a sample of another request has the name of one of these.
        """
        for sample in samples:
            if (name := sample.request.request_id) in self.samples:
                raise ValueError(f"request_id={name!r}: an unfinished request has this id; choose another")
        assembler = samples[0].assembler
        self._requests[assembler.request_id] = list(samples)
        self.samples.update((sample.request.request_id, sample) for sample in samples)
        if assembler.input.num_prompt_logprobs is not None:
            self._scored.add(assembler.request_id)
        if assembler.input.grammar is not None:
            self._constrained.add(assembler.request_id)
        if assembler.input.num_logprobs is not None:
            self._with_logprobs.add(assembler.request_id)

    def get(self, request_id: str) -> Sequence[Sample]:
        """A request's samples; none if there is no such request."""
        return self._requests.get(request_id, ())

    def remove(self, request_id: str) -> Sequence[Sample]:
        """Forgets a request, and returns its samples.

        Raises:
            KeyError: there is no such request.
        """
        samples = self._requests.pop(request_id)
        for sample in samples:
            del self.samples[sample.request.request_id]
        self._scored.discard(request_id)
        self._constrained.discard(request_id)
        self._with_logprobs.discard(request_id)
        return samples

    def clear(self) -> None:
        """Forgets all."""
        for kept in (self.samples, self._requests, self._scored, self._constrained, self._with_logprobs):
            kept.clear()
