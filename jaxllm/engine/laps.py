"""How long each part of something took that is done in order."""

import time


class Laps:
    """Seconds by name, in the order in which the parts ended. Another thread may look on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        """How much there is to do of what takes long, by name, as soon as that is known."""
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """A part has ended that began when the one before it did, or when this was made."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
