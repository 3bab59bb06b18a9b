"""How often an engine may start over before it is given up."""

import time
from collections import deque
from collections.abc import Callable


class RestartBudget:
    """At most so many restarts within so many seconds.

    Args:
        most: restarts; with 0 there are none.
        seconds: restarts longer ago than this do not count.
    """

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._times: deque[float] = deque()

    def take(self) -> bool:
        """Counts a restart; False, and none is counted, if there have been too many."""
        now = self._clock()
        while self._times and now - self._times[0] >= self._seconds:
            self._times.popleft()
        if len(self._times) >= self._most:
            return False
        self._times.append(now)
        return True
