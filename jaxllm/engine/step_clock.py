"""Where the time of a step goes: the host's own work, its waiting, and the device's."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class StepTimes:
    """Where a turn of the step loop spent the host's time, in seconds.

    A turn plans and dispatches a step, and reads one. Where the loop is asynchronous that is the step before:
    the first turn reads nothing, and the last dispatches nothing.
    """

    begin: float = 0.0
    """When the turn began, on the clock of `time.perf_counter`."""
    num_rows: int = 0
    """Of the step that was dispatched."""
    num_tokens: int = 0
    schedule: float = 0.0
    """Planning."""
    pack: float = 0.0
    """Rows of admitted requests, and the plan as integers."""
    dispatch: float = 0.0
    """Handing the programs to the device."""
    wait: float = 0.0
    """Waiting for the tokens of the step that was read."""
    process: float = 0.0
    """From its tokens to outputs."""
    device: float = 0.0
    """Of the step that was read, on the device: exact where the host waited for it, else at most this."""
    gap: float = 0.0
    """At most so long had the device nothing to do before it was given the step that was dispatched."""

    @property
    def host(self) -> float:
        """The host's own work."""
        return self.schedule + self.pack + self.dispatch + self.process

    @property
    def total(self) -> float:
        """The whole turn."""
        return self.host + self.wait


PARTS = ("schedule", "pack", "dispatch", "wait", "process", "device", "gap")
"""The fields of `StepTimes` that are durations."""


class StepClock:
    """Takes the times of one turn after the other."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._times = StepTimes()
        self._last = 0.0
        self._read_at = 0.0
        self._busy_at: float | None = None
        """The device was last known to be working then; None while it is not expected to."""

    def begin(self, *, busy: bool) -> None:
        """A turn begins. `busy`: a step is in flight that is not done."""
        self._last = self._clock()
        self._times = StepTimes(begin=self._last)
        if busy:
            self._busy_at = self._last

    def scheduled(self, num_rows: int, num_tokens: int) -> None:
        """The step is planned."""
        self._times.num_rows, self._times.num_tokens = num_rows, num_tokens
        self._times.schedule = self._lap(self._clock())

    def dispatched(self, packed_at: float, *, busy: bool) -> None:
        """The device has been given the step.

        Args:
            packed_at: when all was ready for it.
            busy: a step before it is still not done.
        """
        self._times.pack = self._lap(packed_at)
        self._times.dispatch = self._lap(self._clock())
        if not busy and self._busy_at is not None:
            self._times.gap = self._last - self._busy_at

    def read(self, packed_at: float) -> None:
        """The tokens of the oldest step are there, of which all had been ready at `packed_at`."""
        self._times.wait = self._lap(self._clock())
        self._times.device = self._last - max(packed_at, self._read_at)
        self._read_at = self._busy_at = self._last

    def end(self, *, idle: bool) -> StepTimes:
        """The turn ends. `idle`: there is nothing to do until a request comes."""
        self._times.process = self._lap(self._clock())
        if idle:
            self._busy_at = None
        return self._times

    def _lap(self, now: float) -> float:
        """Seconds since the last call."""
        seconds, self._last = now - self._last, now
        return seconds
