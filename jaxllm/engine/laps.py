"""How long each part of something took that is done in order."""

import time
from collections.abc import Callable


class Laps:
    """Seconds by name, in the order in which the parts ended. Another thread may look on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.programs: Callable[[], tuple[int, int]] | None = None
        """Of the programs that the last part waits for, how many are there, and how many it wants."""
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """A part has ended that began when the one before it did, or when this was made."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
