"""Starting over what has failed: how often, and after what pauses."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

MOST_RESTARTS, WINDOW_SECONDS = 3, 300.0
"""How often something may start over, and within how many seconds, where nobody says otherwise."""
FIRST_PAUSE = 0.5
"""Seconds before the second restart that counts: what took the device's memory may let go of it."""
MOST_DOUBLINGS = 6
"""Of that pause, with each further restart: 32 seconds are the longest."""


class RestartBudget:
    """At most so many restarts within so many seconds.

    Args:
        most: restarts; with 0 there are none.
        seconds: restarts longer ago than this do not count.
    """

    def __init__(
        self,
        most: int = MOST_RESTARTS,
        seconds: float = WINDOW_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
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

    @property
    def pause(self) -> float:
        """Seconds to wait before the restart that was taken last: none before the first that counts."""
        doublings = len(self._times) - 2
        return FIRST_PAUSE * 2 ** min(doublings, MOST_DOUBLINGS) if doublings >= 0 else 0.0

    def start_over(
        self, what: str, restart: Callable[[], None], error: Exception, stop: threading.Event
    ) -> Exception | None:
        """Restarts something until it runs again; returns early if `stop` is set.

        Args:
            what: it is, for the log.
            restart: raises what keeps it from running.
            error: why it has failed.

        Returns:
            None once it runs again; otherwise why it does not, where the restarts are used up.
        """
        while not stop.is_set() and self.take():
            if stop.wait(self.pause):
                return error
            try:
                restart()
            except Exception as again:
                logger.exception("%s cannot start over", what)
                error = again
            else:
                logger.warning("%s has started over", what)
                return None
        if not stop.is_set():
            logger.critical("%s has failed too often, and is given up", what)
        return error
