"""An engine's sleep: the device's memory given back, and taken again."""

from collections.abc import Callable

import numpy as np

from jaxllm.engine.core import EngineCore
from jaxllm.models.stages import StageWeights


class Sleep:
    """Puts an engine to sleep and wakes it.

    Args:
        core: the engine's.
        load_weights: loads the weights once more, after a sleep that dropped them.
    """

    def __init__(self, core: EngineCore, load_weights: Callable[[], StageWeights]) -> None:
        self._core = core
        self._load_weights = load_weights
        self._saved: tuple[tuple[np.ndarray, ...], ...] | None = None
        self.active = False
        """Whether the engine sleeps."""

    def begin(self, level: int) -> None:
        """Frees pages and weights; level 1 keeps the weights in the host's memory, 2 drops them.

        Raises:
            ValueError: another level.
            RuntimeError: requests are unfinished.
        """
        if level not in (1, 2):
            raise ValueError(
                f"level={level}: must be 1 (weights to the host's memory) or 2 (weights dropped)"
            )
        if self._core.has_unfinished:
            raise RuntimeError(
                f"{self._core.num_unfinished} requests are unfinished; finish or abort them first"
            )
        self._core.drain()
        self._core.scheduler.reset_prefix_cache()
        self._saved = self._core.runner.sleep(keep_weights=level == 1)
        self.active = True

    def end(self) -> None:
        """Puts the weights back, from the host's memory or from where they came, with empty pages."""
        if not self.active:
            return
        self._core.runner.wake(self._load_weights() if self._saved is None else self._saved)
        self._saved, self.active = None, False
