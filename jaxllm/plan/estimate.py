"""How fast requests would be served at best, from compiled steps and the chips' rates."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.plan.kernels import Kernels
from jaxllm.plan.layout import Layout
from jaxllm.plan.pipeline import StepTime, bubble, flow_seconds, round_seconds
from jaxllm.plan.roofline import Links, Work, transfer_seconds
from jaxllm.plan.step import Step, on_line
from jaxllm.plan.workload import Workload
from jaxllm.runner.buckets import Buckets

LOGITS_READ = 1
"""Times that a sampler must read the logits at least."""


@dataclass(frozen=True)
class Estimate:
    """Figures at best: nothing was run, and real ones are lower.

    Attributes:
        requests: at a time on each replica, or in each data group.
        decode: a step that gives a token to each request, or to a stage's share of them; for each stage.
        prefill: a step of the largest bucket, whose tokens are all of one prompt; for each stage.
        ttft_seconds: from a prompt's arrival at an idle engine to its first token; with data groups of as
            many prompts, one in each.
        tpot_seconds: from a token to the next with so many requests, while no prompt comes in.
        bubble: share of that time in which stages wait for each other; 0 where there is one.
        output_tokens_per_second: of all replicas or data groups, the time for prompts included.
        tokens_per_dollar: output tokens; None where no price was given.
    """

    requests: int
    decode: tuple[StepTime, ...]
    prefill: tuple[StepTime, ...]
    ttft_seconds: float
    tpot_seconds: float
    bubble: float
    output_tokens_per_second: float
    tokens_per_dollar: float | None


@dataclass(frozen=True)
class StageWork:
    """What one stage has to do, on each of its chips.

    Attributes:
        kernels: what compilers cannot count.
        decode, prefill: compiled steps; others lie on the line through them.
        logits: bytes of a row of the logits; 0 in stages that make none.
        torus: its chips along each axis of a TPU slice; of several data groups one's.
        hops: links to the next stage's chips, see `transfer_seconds`.
        wide_torus: chips of all data groups, where there are several.
    """

    kernels: Kernels
    decode: Step
    prefill: Step
    logits: int
    torus: tuple[int, ...]
    hops: int = 0
    wide_torus: tuple[int, ...] = ()

    def step(self, tokens: int) -> Step:
        """That of a bucket."""
        if self.prefill.tokens == self.decode.tokens:
            return self.decode
        share = (tokens - self.decode.tokens) / (self.prefill.tokens - self.decode.tokens)
        return on_line(self.decode, self.prefill, share)


@dataclass(frozen=True)
class Estimator:
    """Times of steps on a replica, all of whose data groups do alike."""

    layout: Layout
    buckets: Buckets
    stages: Sequence[StageWork]

    def times(self, rows: int, tokens: int, context: int) -> tuple[StepTime, ...]:
        """A step of rows that are all alike, in each stage; of as many in each data group.

        Args:
            tokens: new ones of each row.
            context: keys of each row, the new tokens' included.
        """
        return tuple(self._time(stage, rows, tokens, context) for stage in self.stages)

    def _time(self, stage: StageWork, rows: int, tokens: int, context: int) -> StepTime:
        layout, target = self.layout, self.layout.target
        bucket = self.buckets.fit(rows * tokens)
        step = stage.step(bucket.tokens)
        groups, experts = layout.num_groups, layout.expert_parallel_size
        links = Links.of(target, stage.torus, layout.group_chips, experts)
        wide = Links.of(target, stage.wide_torus, groups, groups * experts)
        return StepTime(
            Work(step.flops, step.nbytes).seconds(target.chip),
            stage.kernels.work(rows, tokens, context).seconds(target.chip),
            links.seconds(step.collectives) + wide.seconds(step.between_groups),
            Work(0.0, LOGITS_READ * bucket.sampled * stage.logits).seconds(target.chip),
            transfer_seconds(target, step.sent, stage.hops) if len(self.stages) > 1 else 0.0,
        )

    def estimate(self, workload: Workload, requests: int, price_per_chip_hour: float | None) -> Estimate:
        """Figures for `requests` of the workload at a time on each replica, or in each data group."""
        largest, length = self.buckets.largest.tokens, workload.input_len
        steps = min(requests, len(self.stages))  # that are under way at a time
        decode = self.times(-(-requests // steps), 1, length + workload.output_len // 2)
        pieces = [
            self.times(1, min(largest, length - start), min(start + largest, length))
            for start in range(0, length, largest)
        ]
        tpot = round_seconds(decode, steps)
        seconds = requests * self._prompt_seconds(length) + workload.output_len * tpot
        per_second = self.layout.data_parallel_size * requests * workload.output_len / seconds
        hourly = None if price_per_chip_hour is None else price_per_chip_hour * self.layout.num_chips
        return Estimate(
            requests=requests,
            decode=decode,
            prefill=self.times(1, largest, max(largest, length)),
            ttft_seconds=flow_seconds(pieces),
            tpot_seconds=tpot,
            bubble=bubble(decode, steps),
            output_tokens_per_second=per_second,
            tokens_per_dollar=None if hourly is None else per_second * 3600 / hourly,
        )

    def _prompt_seconds(self, tokens: int) -> float:
        """What a prompt takes of steps that it shares with others, in the slowest stage.

        That is its tokens' part of full steps, and its own attention. Other stages work on others meanwhile.
        """
        largest = self.buckets.largest.tokens

        def seconds(stage: StageWork) -> float:
            full = self._time(stage, 1, largest, largest)
            attention = stage.kernels.work(1, tokens, tokens).seconds(self.layout.target.chip)
            work = (full.total - full.kernels) * tokens / largest + attention
            return max(work, full.transfer * tokens / largest)

        return max(map(seconds, self.stages))
