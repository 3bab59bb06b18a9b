"""The closed set of compiled programs: known before the first request, compiled ahead, counted when late."""

import logging
import os
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from jax.stages import Compiled, Lowered
from tqdm import tqdm

logger = logging.getLogger(__name__)


def use_compilation_cache(folder: Path | None) -> None:
    """Keeps compiled programs on disk for later processes; None leaves jax's own setting as it is.

    Programs of every size are kept: a start compiles dozens of small ones, whose times add up.
    Source: https://docs.jax.dev/en/latest/persistent_compilation_cache.html
    """
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Programs:
    """Programs by key, each lowered by a function of no arguments.

    Attributes:
        compiled_late: how many were compiled because a step asked for them, and not ahead.
        seconds: time spent in `compile_ahead`.
    """

    def __init__(self) -> None:
        self.compiled_late = 0
        self.seconds = 0.0
        self._sources: dict[Hashable, Callable[[], Lowered]] = {}
        self._compiled: dict[Hashable, Compiled] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def declare(self, key: Hashable, lower: Callable[[], Lowered]) -> None:
        """Adds a program to the set."""
        self._sources[key] = lower

    def __getitem__(self, key: Hashable) -> Compiled:
        """The compiled program; compiles it now, and counts that, where it was not compiled ahead.

        Raises:
            KeyError: no such program was declared.
        """
        if key not in self._compiled:
            logger.info("compiling %s while serving", key)
            self._compiled[key] = self._sources[key]().compile()
            self.compiled_late += 1
        return self._compiled[key]

    def compile_ahead(self, keys: Iterable[Hashable] | None = None, *, progress: bool = False) -> None:
        """Compiles the programs of these keys, by default all that are not yet compiled.

        Tracing holds Python's lock, so it is done here one by one; XLA compiles in threads meanwhile.
        """
        begin = time.perf_counter()
        wanted = [key for key in (self._sources if keys is None else keys) if key not in self._compiled]
        with (
            ThreadPoolExecutor(os.cpu_count(), "compile") as pool,
            tqdm(total=len(wanted), desc="Compiling", unit="program", disable=not progress) as bar,
        ):
            jobs = {}
            for key in wanted:
                jobs[key] = pool.submit(self._sources[key]().compile)
                jobs[key].add_done_callback(lambda _: bar.update())
            self._compiled.update((key, job.result()) for key, job in jobs.items())
        self.seconds += time.perf_counter() - begin
