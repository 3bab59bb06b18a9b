"""One of a request's outputs, as it is scheduled."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxllm.engine.assembler import OutputAssembler
from jaxllm.engine.constraint import Constraint
from jaxllm.engine.inputs import EngineInput
from jaxllm.engine.outputs import FinishReason
from jaxllm.scheduler.plan import RowPlan, StepPlan
from jaxllm.scheduler.request import Request


class End(NamedTuple):
    """How an output ends, if it does."""

    reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token, unless it is the end of sequence."""
    is_text: bool = True
    """Whether the last token is a part of the text, and not what ended it."""


_GOES_ON = End()


@dataclass(slots=True, eq=False)
class Sample:
    """One of a request's outputs: `n` of them share an assembler."""

    request: Request
    index: int
    seed: int
    assembler: OutputAssembler
    constraint: Constraint | None = None
    """What holds the output to a grammar."""
    next_scored: int = 1
    """First position of the prompt whose logprobs no dispatched step computes."""

    def end(self, token: int) -> End:
        """Whether the output ends with its newest token."""
        input, length = self.assembler.input, len(self.request.output_token_ids)
        # a grammar holds these tokens back by itself, and lets them come where nothing else can
        if length >= input.params.min_tokens or self.constraint is not None:
            if token in input.eos_token_ids:
                return End("stop", is_text=False)
            if token in input.stop_token_ids:
                return End("stop", token, is_text=False)
        if self.constraint is not None and self.constraint.is_complete:
            return End("stop", is_text=not self.constraint.ends_with(token))
        return End("length") if length >= input.max_tokens else _GOES_ON


def make_samples(assembler: OutputAssembler, seed: int, vocab_size: int) -> list[Sample]:
    """All of a request's samples.

    Args:
        seed: of the first; the others' follow it.
        vocab_size: tokens that the model knows.

    Raises:
        ValueError: what the request allows has tokens that the model does not know.
    """
    input = assembler.input
    return [
        Sample(
            _request(assembler.request_id, index, input),
            index,
            seed + index,
            assembler,
            None if input.grammar is None else Constraint(input, vocab_size),
        )
        for index in range(input.params.n)
    ]


def _request(request_id: str, index: int, input: EngineInput) -> Request:
    wants_scores = index == 0 and input.num_prompt_logprobs is not None
    return Request(
        request_id if input.params.n == 1 else f"{request_id}/{index}",
        input.prompt_token_ids,
        input.max_tokens,
        priority=input.priority,
        cache_salt=input.cache_salt,
        skip_prefix_cache=wants_scores or bool(input.params.skip_reading_prefix_cache),
    )


Scored = tuple[Sample, int, int]
"""A sample whose prompt's logprobs a step computes: where the tokens before them begin in the flat batch, and
how many there are."""


def prompts_to_score(
    plan: StepPlan, samples: Mapping[str, Sample], size: int
) -> tuple[tuple[Scored, ...], dict[int, int]]:
    """Which of the step's tokens stand before prompt tokens whose logprobs are wanted, and the latter.

    Args:
        size: of each data group's part of the flat batch.
    """
    scored: list[Scored] = []
    targets: dict[int, int] = {}
    for row, first in _places(plan, size):
        sample = samples[row.request_id]
        if sample.index == 0 and sample.assembler.input.num_prompt_logprobs is not None:
            prompt = sample.request.prompt_token_ids
            # after a preemption the first positions come again
            end = min(row.start + row.num_tokens + 1, len(prompt))
            positions = range(max(row.start + 1, sample.next_scored), end)
            if positions:
                begin = first + positions.start - 1 - row.start
                scored.append((sample, begin, len(positions)))
                targets.update((begin + i, prompt[position]) for i, position in enumerate(positions))
                sample.next_scored = positions.stop
    return tuple(scored), targets


def _places(plan: StepPlan, size: int) -> Iterator[tuple[RowPlan, int]]:
    """Each row, and where its tokens begin in the flat batch."""
    for group, part in enumerate(plan.parts):
        first = group * size
        for row in part.rows:
            yield row, first
            first += row.num_tokens


HeldRow = tuple[int, Sample, Constraint]
"""A row that chooses a token under a grammar, its sample, and what holds that to the grammar."""


def held_rows(plan: StepPlan, samples: Mapping[str, Sample]) -> list[HeldRow]:
    """Such rows of a step."""
    rows = [(row, samples[row.request_id]) for row in plan.rows if row.samples]
    return [(row.row, sample, sample.constraint) for row, sample in rows if sample.constraint is not None]
