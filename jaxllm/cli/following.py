"""What a command does on a host that follows host 0: the work that it is told, and nothing of its own."""

import signal
import sys
from types import FrameType
from typing import Any

from jaxllm.config import EngineConfig


def follow_if_told(model: str, options: dict[str, Any]) -> bool:
    """Whether this host is to follow another, by the engine's options; if so, it has done that to its end.

    The same command is started on every host, but for `--host-rank`.

    Raises:
        Exception: as `jaxllm.engine.hosting.follow_host`.
    """
    config = EngineConfig.create(model, **options)
    if config.parallel.num_hosts == 1:
        return False

    from jaxllm.engine.hosting import follow_host, follows

    if not follows(config):
        return False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_with_host_0)
    follow_host(config, lambda: print("ready, and following host 0", file=sys.stderr, flush=True))
    return True


def _end_with_host_0(number: int, frame: FrameType | None) -> None:
    """The first signal: requests that run on host 0 need this one until they have ended."""
    print("this host ends when host 0 does; a second signal ends both", file=sys.stderr, flush=True)
    signal.signal(number, signal.SIG_DFL)
