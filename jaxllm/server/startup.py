"""Loading the model while the port already answers."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.engine.engine import Engine
from jaxllm.engine.laps import Laps
from jaxllm.engine.replicating import load_engine
from jaxllm.server.config import LimitConfig

logger = logging.getLogger(__name__)

REPORT_SECONDS = 5.0
"""How often the log says how far it is."""


class Startup:
    """Makes the engine in a thread of its own, and says how far that is.

    Args:
        config: the engine's.
        limits: how often the engine may start over after a failure.
        done: called in that thread with the engine, or with what went wrong.
    """

    def __init__(
        self, config: EngineConfig, limits: LimitConfig, done: Callable[[AsyncEngine | Exception], None]
    ) -> None:
        self._config, self._limits = config, limits
        self._done = done
        self._laps = Laps()
        self._begin = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="jaxllm-startup", daemon=True)

    def begin(self) -> None:
        """Starts the thread."""
        self._thread.start()
        threading.Thread(target=self._report, name="jaxllm-startup-log", daemon=True).start()

    @property
    def is_running(self) -> bool:
        """Whether it still loads."""
        return self._thread.is_alive()

    def progress(self) -> dict[str, Any]:
        """How far it is: seconds since it began and of each part that is done, and programs, once known.

        `seconds_left` is what the remaining programs will take at the speed so far.
        """
        now = time.monotonic()
        found: dict[str, Any] = {"seconds": round(now - self._begin, 1)}
        found["done"] = {name: round(seconds, 1) for name, seconds in self._laps.seconds.copy().items()}
        if self._laps.programs is not None:
            compiled, programs = self._laps.programs()
            found |= {"programs": programs, "programs_compiled": compiled}
            if compiled:
                found["seconds_left"] = round((now - self._begin) / compiled * (programs - compiled), 1)
        return found

    def _run(self) -> None:
        try:
            engine = AsyncEngine(
                Engine(load_engine(self._config, laps=self._laps)),
                max_restarts=self._limits.max_engine_restarts,
                restart_window=self._limits.engine_restart_window,
            )
        except Exception as error:
            self._done(error)
            return
        logger.info("loaded in %.1f s", time.monotonic() - self._begin)
        self._done(engine)

    def _report(self) -> None:
        while True:
            self._thread.join(REPORT_SECONDS)
            if not self._thread.is_alive():
                return
            found = self.progress()
            if "programs" in found:
                logger.info(
                    "compiled %d of %d programs, about %s s left",
                    found["programs_compiled"], found["programs"], found.get("seconds_left", "?"),
                )  # fmt: skip
            else:
                logger.info("loading; done: %s", ", ".join(found["done"]) or "nothing yet")
