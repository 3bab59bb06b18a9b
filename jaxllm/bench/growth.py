"""How a step's time grows: with rows, tokens, context, the pool, the longest length allowed, the queue."""

import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from converters.checkpoint import open_checkpoint
from jaxllm.bench import workload
from jaxllm.bench.session import Session
from jaxllm.config import CacheConfig
from jaxllm.engine.sizing import CPU_DEFAULTS
from jaxllm.engine.step_clock import StepTimes

DECODE_STEPS = 16
"""Steps whose median is a point, fewer where the model's length ends them."""
ROWS = (1, 2, 4, 8, 16, 32, 64)
TOKENS = (16, 32, 64, 128, 256, 512)
CONTEXTS = (1024, 2048, 4096, 8192)
POOL_GROWTH = (1, 2, 5, 10)
LENGTHS = (512, 1024, 2048, 4096, 8192)
WAITING = (0, 10, 100, 1_000, 10_000)
WAITING_ROWS = 4
PROMPT_LEN = 64
CONTEXT_ROWS = 4
FEWEST_PAGES = 1024


class Growth:
    """Measures one axis at a time, each with engines of its own.

    Args:
        model: whose weights are random where it is too short for a point.
        options: of the engine; each axis sets those that it varies.
    """

    def __init__(self, model: str, options: dict[str, Any], *, most: int | None = None) -> None:
        self._model, self._options, self._most = model, options, most
        self.axes: dict[str, Callable[[], list[dict[str, float]]]] = {
            "rows": self.rows,
            "tokens": self.tokens,
            "context": self.context,
            "pages": self.pages,
            "max_model_len": self.max_model_len,
            "waiting": self.waiting,
        }

    def measure(self, names: Sequence[str]) -> dict[str, list[dict[str, float]]]:
        """Points of each axis: its value, and medians in milliseconds."""
        return {name: self.axes[name]() for name in names}

    def rows(self) -> list[dict[str, float]]:
        """Rows that decode. Products of matrices grow little until they are no longer bound by memory."""
        counts = self._limited(ROWS)
        with self._session(max_num_seqs=max(counts)) as session:
            return [{"rows": count, **decode(session, count, PROMPT_LEN)} for count in counts]

    def tokens(self) -> list[dict[str, float]]:
        """Tokens of one prompt in one step."""
        counts = self._limited(TOKENS)
        with self._session(max_num_seqs=2, max_num_batched_tokens=max(counts)) as session:
            return [{"tokens": count, **prefill(session, count)} for count in counts]

    def context(self) -> list[dict[str, float]]:
        """Tokens that a row has behind it. Attention reads all of them, and nothing else looks at them."""
        lengths = self._limited(CONTEXTS)
        # The first row decodes while the others' prompts are read, and has to last until all have been.
        budget = self._options.get("max_num_batched_tokens") or CPU_DEFAULTS["max_num_batched_tokens"]
        longest = max(lengths) + _steps_beside(CONTEXT_ROWS, max(lengths), budget)
        page_size = self._options.get("page_size") or CacheConfig().page_size
        pages = (CONTEXT_ROWS + 1) * -(-longest // page_size)
        with self._lengthened(longest, num_pages=pages) as session:
            return [{"context": length, **decode(session, CONTEXT_ROWS, length)} for length in lengths]

    def pages(self) -> list[dict[str, float]]:
        """Pages in the pool. They are updated in place, and nobody looks at those of others."""
        points = []
        for factor in POOL_GROWTH:
            with self._session(num_pages=factor * FEWEST_PAGES, max_num_seqs=8, max_model_len=128) as session:
                points.append({"pages": factor * FEWEST_PAGES, **decode(session, 8, PROMPT_LEN)})
        return points

    def max_model_len(self) -> list[dict[str, float]]:
        """The longest request allowed, with the same short ones running: time follows what is in use."""
        points = []
        for length in self._limited(LENGTHS):
            with self._lengthened(length, num_pages=FEWEST_PAGES, max_num_seqs=8) as session:
                points.append({"max_model_len": length, **decode(session, 8, PROMPT_LEN // 2)})
        return points

    def waiting(self) -> list[dict[str, float]]:
        """Requests that wait in vain for a row."""
        points = []
        with self._session(max_num_seqs=WAITING_ROWS) as session:
            for count in self._limited(WAITING):
                points.append(
                    {"waiting": count, **decode(session, WAITING_ROWS, PROMPT_LEN // 2, waiting=count)}
                )
        return points

    def _limited(self, values: Sequence[int]) -> list[int]:
        """The values up to the largest wanted, at least one of them."""
        if self._most is None:
            return list(values)
        return [value for value in values if value <= self._most] or [self._most]

    def _session(self, **options: Any) -> Session:
        return Session(self._model, **(self._options | {"enable_prefix_caching": False} | options))

    def _lengthened(self, length: int, **options: Any) -> Session:
        """An engine for requests of `length` tokens, with random weights if the model is too short."""
        with closing(open_checkpoint(self._model)) as checkpoint:
            config = dict(checkpoint.config)
        if config.get("max_position_embeddings", 0) >= length:
            return self._session(max_model_len=length, **options)
        config["max_position_embeddings"] = length
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            dummy = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": length, **options}
            return Session(folder, **(self._options | {"enable_prefix_caching": False} | dummy))


def decode(session: Session, rows: int, prompt_len: int, *, waiting: int = 0) -> dict[str, float]:
    """Medians over the steps in which exactly these rows decode."""
    steps = _decode_steps(session, rows, prompt_len)
    prompts = workload.random_prompts(rows, prompt_len, prompt_len, 1, session.vocab_size)
    queue = [[1 + number % 50] for number in range(waiting)]
    params = session.params(steps)
    session.generate(prompts[:1], 1)
    recording = session.start_recording()
    for number, prompt in enumerate(prompts):
        session.engine.add_request(f"row-{number}", prompt, params)
    for number, prompt in enumerate(queue):
        session.engine.add_request(f"queued-{number}", prompt, session.params(1))
    running = {f"row-{number}" for number in range(rows)}
    while running:
        running -= {output.request_id for output in session.engine.step() if output.finished}
    session.engine.abort_all()
    turns = recording.turns
    periods = [
        (b.begin - a.begin, a)
        for a, b in itertools.pairwise(turns)
        if a.num_rows == a.num_tokens == b.num_rows == b.num_tokens == rows
    ]
    return _medians([period for period, _ in periods], [turn for _, turn in periods])


def _decode_steps(session: Session, rows: int, prompt_len: int) -> int:
    """Output tokens: enough for `DECODE_STEPS` steps of all rows, after the steps that the prompts take."""
    sizes = session.parts.cores[0].runner.lowering.sizes
    steps = _steps_beside(rows, prompt_len, sizes.max_num_batched_tokens)
    return min(steps, sizes.max_model_len - prompt_len)


def _steps_beside(rows: int, prompt_len: int, budget: int) -> int:
    """The steps that prompts take of `budget` tokens each, at least, twice, and `DECODE_STEPS` after them."""
    return DECODE_STEPS + 2 * -(-rows * prompt_len // budget) + 2


def prefill(session: Session, tokens: int) -> dict[str, float]:
    """Medians of a prompt's only step."""
    prompt = workload.random_prompts(1, tokens, tokens, 2, session.vocab_size)
    session.generate(prompt, 1)
    seconds, turns = [], []
    for _ in range(3):
        run = session.generate(prompt, 1)
        seconds.append(run.seconds)
        turns += run.recording.steps
    return _medians(seconds, turns)


def _medians(seconds: Sequence[float], turns: Sequence[StepTimes]) -> dict[str, float]:
    if not seconds:
        raise RuntimeError("no step ran with all rows; raise num_pages or max_num_batched_tokens")
    return {
        "step_ms": 1e3 * statistics.median(seconds),
        "host_ms": 1e3 * statistics.median(turn.host for turn in turns),
        "schedule_ms": 1e3 * statistics.median(turn.schedule for turn in turns),
        "gap_ms": 1e3 * statistics.median(turn.gap for turn in turns),
    }
