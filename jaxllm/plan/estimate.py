"""How fast requests would be served at best, from compiled steps and the chips' rates."""

from dataclasses import dataclass

from jaxllm.plan.kernels import Kernels
from jaxllm.plan.layout import Layout
from jaxllm.plan.roofline import Links, Work
from jaxllm.plan.step import Step, on_line
from jaxllm.plan.workload import Workload
from jaxllm.runner.buckets import Buckets

LOGITS_READ = 1
"""Times that a sampler must read the logits at least."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, in parts that follow each other."""

    products: float
    """Everything that XLA compiled: products, norms, embeddings."""
    kernels: float
    """What Pallas kernels do, counted from the sizes."""
    collectives: float
    sampling: float

    @property
    def total(self) -> float:
        """Of the whole step."""
        return self.products + self.kernels + self.collectives + self.sampling


@dataclass(frozen=True)
class Estimate:
    """Figures at best: nothing was run, and real ones are lower.

    Attributes:
        requests: at a time on each replica.
        decode: a step that gives each of them a token.
        prefill: a step of the largest bucket, whose tokens are all of one prompt.
        ttft_seconds: from a prompt's arrival at an idle engine to its first token.
        tpot_seconds: from a token to the next with so many requests, while no prompt comes in.
        output_tokens_per_second: of all replicas, the time for prompts included.
        tokens_per_dollar: output tokens; None where no price was given.
    """

    requests: int
    decode: StepTime
    prefill: StepTime
    ttft_seconds: float
    tpot_seconds: float
    output_tokens_per_second: float
    tokens_per_dollar: float | None


@dataclass(frozen=True)
class Estimator:
    """Times of steps on a replica.

    Attributes:
        kernels: what compilers cannot count.
        decode, prefill: compiled steps; others lie on the line through them.
        logits: bytes of a row of the logits.
    """

    layout: Layout
    buckets: Buckets
    kernels: Kernels
    decode: Step
    prefill: Step
    logits: int

    def time(self, rows: int, tokens: int, context: int) -> StepTime:
        """A step of rows that are all alike.

        Args:
            tokens: new ones of each row.
            context: keys of each row, the new tokens' included.
        """
        chip, bucket = self.layout.target.chip, self.buckets.fit(rows * tokens)
        step = self._step(bucket.tokens)
        layout = self.layout
        links = Links.of(layout.target, layout.torus, layout.replica_chips, layout.expert_parallel_size)
        return StepTime(
            Work(step.flops, step.nbytes).seconds(chip),
            self.kernels.work(rows, tokens, context).seconds(chip),
            links.seconds(step.collectives),
            Work(0.0, LOGITS_READ * bucket.sampled * self.logits).seconds(chip),
        )

    def _step(self, tokens: int) -> Step:
        if self.prefill.tokens == self.decode.tokens:
            return self.decode
        share = (tokens - self.decode.tokens) / (self.prefill.tokens - self.decode.tokens)
        return on_line(self.decode, self.prefill, share)

    def estimate(self, workload: Workload, requests: int, price_per_chip_hour: float | None) -> Estimate:
        """Figures for `requests` of the workload at a time on each replica."""
        largest = self.buckets.largest.tokens
        decode = self.time(requests, 1, workload.input_len + workload.output_len // 2)
        prefill = self.time(1, largest, max(largest, workload.input_len))
        chunks = [
            (min(largest, workload.input_len - start), min(start + largest, workload.input_len))
            for start in range(0, workload.input_len, largest)
        ]
        ttft = sum(self.time(1, tokens, context).total for tokens, context in chunks)
        seconds = requests * self._prompt_seconds(workload.input_len) + workload.output_len * decode.total
        per_second = self.layout.data_parallel_size * requests * workload.output_len / seconds
        hourly = None if price_per_chip_hour is None else price_per_chip_hour * self.layout.num_chips
        return Estimate(
            requests=requests,
            decode=decode,
            prefill=prefill,
            ttft_seconds=ttft,
            tpot_seconds=decode.total,
            output_tokens_per_second=per_second,
            tokens_per_dollar=None if hourly is None else per_second * 3600 / hourly,
        )

    def _prompt_seconds(self, tokens: int) -> float:
        """What a prompt takes of steps that it shares with others: its tokens' part of full ones."""
        full = self.time(1, self.buckets.largest.tokens, self.buckets.largest.tokens)
        attention = self.kernels.work(1, tokens, tokens).seconds(self.layout.target.chip)
        return (full.total - full.kernels) * tokens / self.buckets.largest.tokens + attention
