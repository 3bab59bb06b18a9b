"""What a command does on a host that follows host 0: the work that it is told, and nothing of its own."""

import sys
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
    follow_host(config, lambda: print("ready, and following host 0", file=sys.stderr, flush=True))
    return True
