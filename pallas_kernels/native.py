"""Builds C++ kernels for the CPU with the compiler that is there, and keeps them in a cache folder."""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jaxlib.version

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-DNDEBUG")
HEADERS = Path(__file__).parent
"""Where those are that several sources include; others lie beside their source."""
NATIVE_FLAGS = ("-march=native", "-mcpu=native", "")
"""The first that the compiler takes: of x86, of ARM, and of any other."""
SECONDS = 300
"""Most that a build may take; it takes about 10."""


class BuildError(RuntimeError):
    """A library could not be built: there is no compiler, or it refused the source."""


@dataclass(frozen=True)
class Source:
    """A file of C++ that is built into a library.

    Attributes:
        flags: to be added to `FLAGS`.
        compiler: its command; None: the first of `COMPILERS` that is there.
        folder: where libraries are kept; None: the user's cache folder.
    """

    path: Path
    flags: tuple[str, ...] = ()
    compiler: str | None = None
    folder: Path | None = None

    def build(self) -> Path:
        """The library's path, built unless it is there already.

        Libraries are named by all that they depend on, so none is ever stale, and appear under their names
        only when whole, so that several processes may build the same one.

        Raises:
            BuildError: there is no compiler, or it failed; the message has what it said.
        """
        compiler = self.find_compiler()
        library = self._folder() / f"{self.path.stem}-{self._key(compiler)}.so"
        if library.exists():
            return library
        begin = time.perf_counter()
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(suffix=".so", prefix=f".{self.path.stem}-", dir=library.parent)
        except OSError as error:
            raise BuildError(f"{library.parent}: {error}") from error
        os.close(handle)
        try:
            self._compile(compiler, name)
            Path(name).replace(library)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        logger.info("built %s in %.1f s", library, time.perf_counter() - begin)
        return library

    def _compile(self, compiler: str, output: str) -> None:
        said = ""
        for native in NATIVE_FLAGS:
            include = (f"-I{jax.ffi.include_dir()}", f"-I{HEADERS}")
            command = [compiler, *FLAGS, *self.flags, *filter(None, [native]), *include]
            said = _run([*command, str(self.path), "-o", output])
            if not said:
                return
            if "native" not in said:  # the flag is not what it stumbled over
                break
        raise BuildError(f"{compiler} cannot build {self.path.name}: {said[-2000:]}")

    def find_compiler(self) -> str:
        """The compiler's path.

        Raises:
            BuildError: there is none.
        """
        wanted = COMPILERS if self.compiler is None else (self.compiler,)
        for name in wanted:
            if found := shutil.which(name):
                return found
        raise BuildError(f"no C++ compiler: {', '.join(wanted)} not found")

    def _folder(self) -> Path:
        import platformdirs  # which machines that only have a GPU to test on may lack

        return self.folder or Path(platformdirs.user_cache_dir("jaxllm")) / "native"

    def _key(self, compiler: str) -> str:
        stat = os.stat(os.path.realpath(compiler))
        parts = (
            self.path.read_bytes(),
            *(header.read_bytes() for folder in (HEADERS, self.path.parent) for header in _headers(folder)),
            f"{os.path.realpath(compiler)} {stat.st_size} {stat.st_mtime_ns}",
            FLAGS,
            NATIVE_FLAGS,
            self.flags,
            jaxlib.version.__version__,
            processor(),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


_BEGUN: "list[Library]" = []
"""Libraries whose handlers programs may call."""


def built_keys() -> dict[str, str]:
    """What the libraries that were begun are made of, by their files' names; waits for those being built.

    Once this has returned, XLA knows their handlers, and programs that were kept on disk can be loaded.
    """
    keys = {}
    for library in list(_BEGUN):
        with contextlib.suppress(BuildError):  # nothing can call one that could not be built
            keys[library.source.path.name] = library.key()
    return keys


@dataclass
class Library:
    """A library that is built in the background, and whose FFI handlers are then known to XLA.

    Attributes:
        handlers: names of the handlers' symbols.
    """

    source: Source
    handlers: tuple[str, ...]
    _built: "Future[str] | None" = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self) -> None:
        """Starts to build, unless that has been done; returns at once."""
        with self._lock:
            if self._built is None:
                self._built = Future()
                _BEGUN.append(self)
                threading.Thread(
                    target=self._run, args=(self._built,), name="native-build", daemon=True
                ).start()

    def targets(self) -> dict[str, str]:
        """For each handler the target that XLA knows it by; waits for the build.

        The name has a hash of what the library was made of: a compiled program that is kept on disk can only
        meet the code that it was compiled for.

        Raises:
            BuildError: it could not be built.
        """
        key = self.key()
        return {handler: f"{handler}_{key}" for handler in self.handlers}

    def key(self) -> str:
        """A hash of what the library was made of; waits for the build.

        Raises:
            BuildError: it could not be built.
        """
        self.prepare()
        assert self._built is not None
        return self._built.result()

    def _run(self, built: "Future[str]") -> None:
        try:
            path = self.source.build()
            library = ctypes.CDLL(str(path))
            key = path.stem.rpartition("-")[2]
            for handler in self.handlers:
                capsule = jax.ffi.pycapsule(getattr(library, handler))
                jax.ffi.register_ffi_target(f"{handler}_{key}", capsule, platform="cpu")
        except BuildError as error:
            built.set_exception(error)
        except Exception as error:  # whoever waits for the library would wait for ever
            built.set_exception(BuildError(f"{self.source.path.name}: {type(error).__name__}: {error}"))
        else:
            built.set_result(key)


def _headers(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.h"))


def _run(command: list[str]) -> str:
    """What the compiler complained of; empty where it succeeded."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not done within {SECONDS} s"
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr or f"exit status {done.returncode}")


def processor() -> str:
    """What `-march=native` depends on: the processor's model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    first = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return repr([first[name] for name in wanted if name in first])
