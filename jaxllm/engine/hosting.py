"""An engine on several hosts: what must be the same on all of them, and what those do that follow."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
from jax.sharding import Mesh

from jaxllm.config import EngineConfig
from jaxllm.engine.laps import Laps
from jaxllm.engine.loading import EngineParts, load_parts
from jaxllm.parallel.hosts import HostGroup, HostLostError
from jaxllm.parallel.meeting import find_rank, meet
from jaxllm.runner.hosts import follow
from jaxllm.runner.identity import DISTRIBUTIONS, PACKAGES, package_files

OWN_OPTIONS = frozenset(
    (
        "cache_dir",
        "compilation_cache",
        "compilation_cache_dir",
        "coordinator_address",
        "coordinator_port",
        "distributed_executor_backend",
        "host_rank",
        "keep_executables",
        "model",
        "progress",
        "ray_resources",
        "revision",
        "skip_tokenizer_init",
        "token",
        "tokenizer",
        "trust_remote_code",
    )
)
"""Options that hosts may differ in: where things are, and what only host 0 does. That their models are alike
is seen by their sizes, later."""


def meet_hosts(config: EngineConfig, failed: Callable[[], str | None] = lambda: None) -> HostGroup:
    """Connects this host with the others; see `jaxllm.parallel.meeting.meet`.

    Args:
        failed: why there is no use in waiting for the others any more, if that is so.

    Raises:
        MeetingError: they have not come, or have other versions or options.
    """
    return meet(config.parallel, host_facts(config), failed=failed)


def follows(config: EngineConfig) -> bool:
    """Whether this host follows host 0; where jax finds the hosts by itself, it does so now."""
    return config.parallel.num_hosts != 1 and find_rank(config.parallel) > 0


def follow_host(config: EngineConfig, on_loaded: Callable[[], object] = lambda: None) -> None:
    """Does host 0's work on this host's devices, until the engine there is closed.

    Args:
        on_loaded: called when this host is ready.

    Raises:
        MeetingError: host 0 has not been found, or has refused this host.
        HostLostError: a host is gone or has failed, this one included.
    """
    hosts = meet_hosts(config)
    try:
        parts = load_on_hosts(config, hosts)
    except Exception as error:
        raise HostLostError(f"host {hosts.rank} has failed: {error}") from error
    on_loaded()
    follow(parts.cores[0].runner, hosts)


def load_on_hosts(
    config: EngineConfig, hosts: HostGroup, mesh: Mesh | None = None, laps: Laps | None = None
) -> EngineParts:
    """Builds this host's part of an engine; if that fails, the other hosts are told.

    Raises:
        Exception: as `load_parts`.
    """
    try:
        return load_parts(config, mesh, laps, hosts=hosts)
    except Exception as error:
        hosts.fail(f"{type(error).__name__}: {error}")
        raise


def host_facts(config: EngineConfig) -> dict[str, Any]:
    """Versions and options that must be the same on all hosts."""
    facts: dict[str, Any] = {name: version(name) for name in DISTRIBUTIONS}
    facts["python"] = ".".join(map(str, sys.version_info[:2]))
    facts["jaxllm"] = _code_digest()
    for part in dataclasses.fields(config):
        options = getattr(config, part.name)
        for field in dataclasses.fields(options):
            if field.name not in OWN_OPTIONS:
                facts[field.name] = str(getattr(options, field.name))
    if config.parallel.num_hosts == 0:
        facts["num_hosts"] = str(jax.process_count())
    return facts


def _code_digest() -> str:
    """The version, and a digest of all code, which may have been edited."""
    found = hashlib.sha256()
    for package in PACKAGES:
        for file, folder in package_files(package):
            found.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return f"{version('jaxllm')} ({found.hexdigest()[:12]})"
