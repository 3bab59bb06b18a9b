"""Hosts as processes on this machine: each with devices of its own, meeting on the loopback interface."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxllm.cli.flags import flag_name

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "page_size": 4,
    "num_pages": 200,
    "max_model_len": 96,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 8,
    "enforce_eager": True,
    "compilation_cache": False,  # the tests' own folder stays in force
    "progress": False,
}
"""Few and small programs: every host compiles them."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def flags(**options: Any) -> list[str]:
    """Options as they stand on the command line."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(flag_name(name) if value else "--no-" + flag_name(name)[2:])
        else:
            words += [flag_name(name), str(value)]
    return words


@dataclass
class HostProcess:
    """One host's process."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    """Its lines so far, of stdout and stderr."""

    def __post_init__(self) -> None:
        self.reading = threading.Thread(target=self._read, daemon=True)
        self.reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)

    def wait_for(self, text: str, seconds: float = 150) -> str:
        """The first line with a text."""
        end = time.monotonic() + seconds
        while True:
            for line in list(self.log):
                if text in line:
                    return line
            assert time.monotonic() < end, f"{text!r} has not come:\n{''.join(self.log)}"
            assert self.process.poll() is None or any(text in line for line in self.log), "".join(self.log)
            time.sleep(0.02)

    def wait(self, seconds: float) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{''.join(self.log)}") from None


@contextmanager
def host_process(argv: Sequence[str], devices: int) -> Iterator[HostProcess]:
    """Runs `jaxllm` with `devices` virtual devices; killed if it is still there at the end."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as `quick_compile` does
    }
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from jaxllm.cli.main import main; sys.exit(main())", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    made = HostProcess(process)
    try:
        yield made
    finally:
        process.kill()
        process.wait()
        made.reading.join()
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def hosts(
    command: Sequence[str],
    count: int,
    *,
    devices: int = 1,
    differently: Mapping[int, Sequence[str]] = MappingProxyType({}),
    models: Mapping[int, Path] = MappingProxyType({}),
) -> Iterator[list[HostProcess]]:
    """Starts a command on several hosts.

    Args:
        differently: more flags for some of them, by their ranks.
        models: for some of them, in place of the command's.
    """
    port, made = free_port(), []
    with ExitStack() as stack:
        for rank in range(count):
            where = flags(num_hosts=count, host_rank=rank, coordinator_address=f"127.0.0.1:{port}")
            own = [command[0], str(models.get(rank, command[1])), *command[2:]]
            argv = [*own, *where, *differently.get(rank, [])]
            made.append(stack.enter_context(host_process(argv, devices)))
        yield made
