"""Metrics that keep every value, where the engine's own keep histograms: for runs that end."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxllm.engine.metrics import Metrics, RequestMetrics
from jaxllm.engine.step_clock import StepTimes
from jaxllm.scheduler.grouped import GroupedScheduler
from jaxllm.scheduler.scheduler import Scheduler


@dataclass
class Recording:
    """What happened while one set of requests ran. Several replicas may write to it at a time.

    Attributes:
        requests: one for each request, in order of arrival.
        token_latencies: seconds from each token to the next of the same request.
        token_times: when each token reached the host, on the engine's clock.
        turns: of the step loop.
        pages: after each turn the pages that requests held, on the replica whose turn it was.
        waste: after each turn the share of their slots that held no token.
    """

    requests: list[RequestMetrics] = field(default_factory=list)
    token_latencies: list[float] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    turns: list[StepTimes] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    waste: list[float] = field(default_factory=list)
    writing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def steps(self) -> list[StepTimes]:
        """The turns that dispatched a step."""
        return [turn for turn in self.turns if turn.num_rows]

    @property
    def page_waste(self) -> float:
        """Share of the slots of held pages without a token, over all turns."""
        held = sum(self.pages)
        return sum(p * w for p, w in zip(self.pages, self.waste, strict=True)) / held if held else 0.0


class Recorder(Metrics):
    """Takes the place of an engine's metrics.

    Attributes:
        recording: what it writes to; put another one there for each run.
        due: the next request's time of arrival, where it was to come before the engine could be told.
    """

    def __init__(
        self, scheduler: Scheduler | GroupedScheduler, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self.recording = Recording()
        self.due: float | None = None
        self._scheduler = scheduler

    def request_arrived(self, num_prompt_tokens: int, *, arrival_time: float | None = None) -> RequestMetrics:
        """Keeps the request's own record."""
        request = super().request_arrived(num_prompt_tokens, arrival_time=arrival_time or self.due)
        self.recording.requests.append(request)
        return request

    def tokens_generated(self, request: RequestMetrics, count: int, *, index: int = 0) -> None:
        """Keeps the time since the request's last tokens. Those that come together share it equally."""
        last = request.last_token_time
        super().tokens_generated(request, count, index=index)
        now = request.last_token_time
        if now is not None and count:
            self.recording.token_times += [now] * count
            if last is not None:
                self.recording.token_latencies += [(now - last) / count] * count

    def step_done(self, times: StepTimes) -> None:
        """Keeps the turn's times, and how the pages are used."""
        super().step_done(times)
        if times.num_rows or times.wait:
            stats = self._scheduler.stats()
            with self.recording.writing:
                self.recording.turns.append(times)
                self.recording.pages.append(stats.cache.num_used)
                self.recording.waste.append(stats.waste)
