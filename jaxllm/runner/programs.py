"""The closed set of compiled programs: known before the first request, made ahead, counted when late."""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
from jax.stages import Compiled, Lowered
from tqdm import tqdm

from jaxllm.runner.kept import Kept

logger = logging.getLogger(__name__)

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} programs [{elapsed}<{remaining}]"
"""Without a rate: programs that were kept are there at once, which makes a million a second of them."""


def use_compilation_cache(folder: Path | None) -> None:
    """Keeps what XLA compiles on disk for later processes; None leaves jax's own setting as it is.

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

    `begin` has threads make them in order, while the caller does something else, or serves already with those
    that are there. A program is loaded if an earlier process has kept it, else traced and compiled.

    Attributes:
        compiled_late: how many were compiled because a step asked for them, and not ahead.
        seconds: from `begin` until the last program was there.
    """

    def __init__(self, sources: Mapping[Hashable, Callable[[], Lowered]], kept: Kept | None = None) -> None:
        self.compiled_late = 0
        self.seconds = 0.0
        self._sources = dict(sources)
        self._kept = kept
        self._compiled: dict[Hashable, Compiled] = {}
        self._failed: dict[Hashable, Exception] = {}
        self._waiting: deque[Hashable] = deque()
        self._running: set[Hashable] = set()
        self._threads: list[threading.Thread] = []
        self._wanted_threads = 0
        self._changed = threading.Condition()
        self._tracing = threading.Lock()  # it holds Python's lock anyway: one traces while another compiles

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._sources)

    def __contains__(self, key: object) -> bool:
        """Whether the program can run now."""
        return key in self._compiled

    def __getitem__(self, key: Hashable) -> Compiled:
        """The program; makes it now, and counts that, where it was not made ahead.

        Raises:
            KeyError: there is no such program.
        """
        if key in self._compiled:
            return self._compiled[key]
        with self._changed:
            self.compiled_late += 1
            if key in self._waiting:
                self._waiting.remove(key)
            self._changed.wait_for(lambda: key not in self._running)
        if key not in self._compiled:
            logger.info("compiling %s now: it was not compiled ahead", key)
            self._compiled[key] = self._make(key)
        return self._compiled[key]

    @property
    def num_pending(self) -> int:
        """Programs that are being made, or wait for it."""
        with self._changed:
            return len(self._waiting) + len(self._running)

    @property
    def num_loaded(self) -> int:
        """Programs that an earlier process had kept."""
        return 0 if self._kept is None else self._kept.num_loaded

    def begin(self, keys: Iterable[Hashable] | None = None) -> None:
        """Has threads, one for each core, make these programs in order; by default all."""
        started = time.perf_counter()
        with self._changed:
            self._waiting.extend(self._sources if keys is None else keys)
            self._wanted_threads = os.cpu_count() or 1
            count = min(self._wanted_threads, len(self._waiting))
        for index in range(count):
            thread = threading.Thread(target=self._run, args=(index, started), name=f"compile-{index}")
            self._threads.append(thread)
            thread.start()

    def serve_beside(self) -> None:
        """Leaves most of the cores to steps that run beside the compiler from now on."""
        self._wanted_threads = max(1, (os.cpu_count() or 1) // 4)

    def wait(
        self, keys: Iterable[Hashable] | None = None, *, progress: bool = False, timeout: float | None = None
    ) -> bool:
        """Waits for programs that `begin` was given, by default for all; False if that took too long.

        Raises:
            Exception: what compiling one of them raised.
        """
        wanted = set(self._sources if keys is None else keys)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with (
            self._changed,
            tqdm(total=len(wanted), desc="Compiling", bar_format=BAR, disable=not progress) as bar,
        ):
            while pending := wanted & (self._running | set(self._waiting)):
                if (left := deadline - time.monotonic()) <= 0:
                    return False
                bar.n = len(wanted) - len(pending)
                bar.refresh()
                self._changed.wait(min(left, 0.5))  # not longer, so that the bar's clock goes on
            bar.n = len(wanted & self._compiled.keys())
            bar.refresh()
            for key in wanted & self._failed.keys():
                raise self._failed[key]
        return True

    def close(self) -> None:
        """Forgets all programs; waits for those being compiled just now, and begins no more."""
        with self._changed:
            self._waiting.clear()
        for thread in self._threads:
            if thread is not threading.current_thread():  # where the garbage collector closes an engine
                thread.join()
        self._threads.clear()
        self._compiled.clear()

    def _run(self, index: int, started: float) -> None:
        """Makes one program after the other; ends when the interpreter does, which waits for threads."""
        main = threading.main_thread()
        while main.is_alive() and index < self._wanted_threads:
            with self._changed:
                if not self._waiting:
                    return
                key = self._waiting.popleft()
                self._running.add(key)
            try:
                self._compiled[key] = self._make(key)
            except Exception as error:
                logger.exception("program %s cannot be compiled", key)
                self._failed[key] = error
            with self._changed:
                self._running.remove(key)
                self.seconds = max(self.seconds, time.perf_counter() - started)
                self._changed.notify_all()

    def _make(self, key: Hashable) -> Compiled:
        lower, kept = self._sources[key], self._kept
        if kept is not None and (loaded := kept.load(key)) is not None:
            return loaded
        with self._tracing:
            lowered = lower()
        return lowered.compile() if kept is None else kept.compile(key, lowered)


def wait_for_all(programs: Sequence[Programs], timeout: float | None) -> bool:
    """Waits for several sets of programs, as `Programs.wait`, for at most `timeout` seconds together."""
    end = None if timeout is None else time.monotonic() + timeout
    return all(own.wait(timeout=None if end is None else end - time.monotonic()) for own in programs)


def program_figures(programs: Sequence[Programs]) -> dict[str, float]:
    """Counts of several sets of programs together, under the names of `Engine.get_metrics`."""
    return {
        "programs": float(sum(map(len, programs))),
        "programs_pending": float(sum(own.num_pending for own in programs)),
        "programs_loaded": float(sum(own.num_loaded for own in programs)),
        "programs_compiled_late_total": float(sum(own.compiled_late for own in programs)),
        "compile_seconds": max(own.seconds for own in programs),
    }
