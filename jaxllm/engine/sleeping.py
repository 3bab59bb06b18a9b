"""An engine's sleep: the device's memory given back, and taken again."""

from collections.abc import Sequence

from jaxllm.engine.core import EngineCore
from jaxllm.engine.replicas import Replicas
from jaxllm.wording import counted


class Sleep:
    """Puts an engine to sleep and wakes it.

    Args:
        core: the engine's.
        cores: `core` itself, or those of its replicas.
    """

    def __init__(self, core: EngineCore | Replicas, cores: Sequence[EngineCore]) -> None:
        self._core = core
        self._cores = cores
        self.active = False
        """Whether the engine sleeps."""

    def begin(self, level: int) -> None:
        """Frees pages and weights; level 1 keeps the weights in the host's memory, 2 drops them.

        Raises:
            ValueError: another level.
            RuntimeError: requests are unfinished, or there is nothing that has not failed.
            Exception: the host has no room for the weights. All replicas stay awake.
        """
        if level not in (1, 2):
            raise ValueError(
                f"level={level}: must be 1 (weights to the host's memory) or 2 (weights dropped)"
            )
        if self._core.has_unfinished:
            raise RuntimeError(
                f"{counted(self._core.num_unfinished, 'unfinished request')}; finish or abort first"
            )
        if all(core.failure is not None for core in self._cores):
            raise RuntimeError("all replicas have failed, and start over; try again when one serves")
        self._core.drain()
        try:
            for core in self._cores:
                core.scheduler.reset_prefix_cache()
                if core.failure is None:  # else its device may take no orders any more
                    core.runner.sleep(keep_weights=level == 1)
        except Exception:
            for core in self._cores:
                core.runner.wake()  # those that sleep by now
            raise
        self.active = True

    def end(self) -> None:
        """Puts the weights back, from the host's memory or from where they came, with empty pages."""
        if not self.active:
            return
        for core in self._cores:
            if core.failure is None:
                core.runner.wake()
        self.active = False
