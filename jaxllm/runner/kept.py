"""Compiled programs that earlier processes have left on disk, whole, so that a start need not trace them."""

import contextlib
import hashlib
import logging
import os
import pickle
import stat
import tempfile
import threading
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled, Lowered

logger = logging.getLogger(__name__)

MAX_BYTES = 2 * 1024**3
"""Of all files together; the ones that were not used for the longest time are deleted."""
_MAGIC = b"jaxllm program 1\n"


_COMPILED = "/jax/core/compile/backend_compile_duration"
_HIT = "/jax/compilation_cache/cache_hits"
_LISTENING = "/jaxllm/listening"


def compile_watched(lowered: Lowered) -> tuple[Compiled, bool]:
    """Compiles, and tells whether XLA is known to have done so just now.

    Otherwise jax has found the program in its cache on disk, or in memory, where it may have come from disk.
    What XLA on CPU has deserialized it cannot serialize again: the code is missing from it, which shows when
    it is run (jaxlib 0.10.2).
    """
    heard: list[str] = []
    thread = threading.get_ident()

    def listen(event: str, *_: Any, **__: Any) -> None:
        if threading.get_ident() == thread:
            heard.append(event)

    jax.monitoring.register_event_listener(listen)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        compiled = lowered.compile()
        jax.monitoring.record_event(_LISTENING)
    finally:
        with contextlib.suppress(AssertionError):  # somebody has cleared all listeners, and it hears no more
            jax.monitoring.unregister_event_listener(listen)
            jax.monitoring.unregister_event_duration_listener(listen)
    return compiled, _COMPILED in heard and _LISTENING in heard and _HIT not in heard


class Kept(Protocol):
    """Where programs are looked for before they are compiled, and left afterwards."""

    @property
    def num_loaded(self) -> int:
        """Programs that were found."""
        ...

    def load(self, key: Any, /) -> Compiled | None:
        """The program, if it is there and whole."""
        ...

    def compile(self, key: Any, lowered: Lowered, /) -> Compiled:
        """Compiles a program, and keeps it for later processes."""
        ...


class KeptPrograms:
    """A folder of programs. Files are named by all that a program depends on (see `jaxllm.runner.identity`).

    A program is machine code that this process will run, and its file a pickle, which can run code too: who
    can write into the folder can do as this user. So the folder is the user's alone, and one that others can
    write to is not used.

    Nothing here ever fails a start: what cannot be read or written is logged, and the program is compiled.

    Args:
        folder: made, for the user alone, where it is not there.
        identity: what all programs depend on, besides their keys.
        devices: that the programs run on.
    """

    def __init__(
        self, folder: Path, identity: str, devices: Sequence[Any], *, max_bytes: int = MAX_BYTES
    ) -> None:
        self._folder = folder
        self._identity = identity
        self._devices = devices
        self._max_bytes = max_bytes
        self._usable = self._prepare()
        self._counting = threading.Lock()
        self.num_loaded = 0
        """Programs that were found."""

    def load(self, key: Hashable) -> Compiled | None:
        """The program, if it is there and whole."""
        path = self._path(key)
        if not self._usable or not path.exists():
            return None
        try:
            content = path.read_bytes()
            digest, payload = content[len(_MAGIC) : len(_MAGIC) + 32], content[len(_MAGIC) + 32 :]
            if not content.startswith(_MAGIC) or hashlib.sha256(payload).digest() != digest:
                raise ValueError("the file is damaged")
            serialized, in_tree, out_tree = pickle.loads(payload)
            compiled = serialize_executable.deserialize_and_load(
                serialized,
                in_tree,
                out_tree,
                backend=self._devices[0].client,
                execution_devices=self._devices,
            )
            os.utime(path)
        except Exception as error:  # of a file from another time anything may be wrong
            logger.warning("program %s: %s cannot be used (%s); compiling it", key, path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with self._counting:
            self.num_loaded += 1
        return compiled

    def __contains__(self, key: Hashable) -> bool:
        return self._path(key).exists()

    def compile(self, key: Hashable, lowered: Lowered) -> Compiled:
        """Compiles a program, and keeps it for later processes."""
        compiled, is_new = compile_watched(lowered)
        if self._usable and is_new:
            self._save(key, compiled)
        return compiled

    def _save(self, key: Hashable, compiled: Compiled) -> None:
        try:
            payload = pickle.dumps(serialize_executable.serialize(compiled))
            self._write(self._path(key), _MAGIC + hashlib.sha256(payload).digest() + payload)
            self._delete_oldest()
        except Exception as error:  # not every backend can serialize every program
            logger.warning("program %s cannot be kept in %s: %s", key, self._folder, error)

    def _path(self, key: Hashable) -> Path:
        name = hashlib.sha256(f"{key!r} {self._identity}".encode()).hexdigest()
        return self._folder / f"{name[:40]}.program"

    def _prepare(self) -> bool:
        """Makes the folder; whether it is there and the user's alone."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self._folder.stat()
        except OSError as error:
            logger.warning("compiled programs are not kept: %s", error)
            return False
        others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if others or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
            logger.warning("compiled programs are not kept: others can write to %s", self._folder)
            return False
        return True

    def _write(self, path: Path, content: bytes) -> None:
        """Under its name only when whole, so that several processes may write the same one."""
        handle, name = tempfile.mkstemp(dir=self._folder, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(name).replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    def _delete_oldest(self) -> None:
        found: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process may delete too
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            total -= size


class KeptStages:
    """The same for a model in stages: keys are pairs of the stage's number and its own key."""

    def __init__(self, stages: Sequence[KeptPrograms]) -> None:
        self._stages = stages

    @property
    def num_loaded(self) -> int:
        """Programs that were found."""
        return sum(stage.num_loaded for stage in self._stages)

    def load(self, key: tuple[int, Hashable]) -> Compiled | None:
        """The program, if it is there and whole."""
        return self._stages[key[0]].load(key[1])

    def compile(self, key: tuple[int, Hashable], lowered: Lowered) -> Compiled:
        """Compiles a program, and keeps it for later processes."""
        return self._stages[key[0]].compile(key[1], lowered)
