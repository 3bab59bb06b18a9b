"""Where the hosts of an engine meet first: who comes with other versions or options is refused."""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.config import ParallelConfig
from jaxllm.parallel.channel import Channel, ChannelClosedError, Message
from jaxllm.parallel.hosts import SILENCE, HostGroup, differences

logger = logging.getLogger(__name__)

GREETING = "jaxllm 1"
"""What a host says first; the number is the protocol's."""
MEETING_SECONDS = 600.0
"""How long hosts wait for each other: some machines take minutes to start."""
RETRY_SECONDS, ASK_SECONDS = 0.2, 0.5
SHUTDOWN_SECONDS = 20
"""How long a host that ends waits for the others to do so."""
NAME_BYTES = 256
TUNE_ALONE = "--xla_gpu_shard_autotuning=false"
"""XLA on GPUs has all hosts tune a part of each program, and would wait for those that have other stages and
do not compile it (https://github.com/openxla/xla/pull/13108)."""


class MeetingError(RuntimeError):
    """The hosts have not found together; the message says why."""


def find_rank(config: ParallelConfig) -> int:
    """This host's number; where jax finds the hosts by itself, it does so now.

    This comes before XLA is first used: it is told here if hosts are to have programs of their own.
    """
    if config.pipeline_parallel_size > 1:
        _set_xla_flag(TUNE_ALONE)
    if config.num_hosts:
        return config.host_rank
    if not jax.distributed.is_initialized():
        _start_jax()
    return jax.process_index()


def meet(
    config: ParallelConfig,
    facts: Mapping[str, Any],
    seconds: float = MEETING_SECONDS,
    failed: Callable[[], str | None] = lambda: None,
) -> HostGroup:
    """Connects this host with the others, and starts jax's distributed runtime.

    Args:
        facts: what must be the same on all hosts: versions, options.
        seconds: how long to wait for the others.
        failed: asked now and then why they will not come, if somebody knows that.

    Raises:
        MeetingError: the others did not come in time, or host 0 has refused this one.
    """
    end, rank = time.monotonic() + seconds, find_rank(config)
    if config.num_hosts:
        host, port = config.coordinator
        if rank:
            return _join(rank, (host, port), config.num_hosts, facts, end)
        with _listen(host, port) as listener:
            return _lead(listener, host, config.num_hosts, facts, end, failed)
    if rank:
        return _join(rank, _announced(None), jax.process_count(), facts, end)
    host = _own_address()
    with _listen(host, 0) as listener:
        _announced(f"{host}:{listener.getsockname()[1]}")
        return _lead(listener, host, jax.process_count(), facts, end, failed)


def _announced(address: str | None) -> tuple[str, int]:
    """The address that host 0 gives, on every host."""
    data = np.zeros(NAME_BYTES, np.uint8)
    if address is not None:
        data[: len(address)] = np.frombuffer(address.encode(), np.uint8)
    told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))).rstrip(b"\0").decode()
    host, _, port = told.rpartition(":")
    return host, int(port)


def _lead(
    listener: socket.socket,
    host: str,
    num_hosts: int,
    facts: Mapping[str, Any],
    end: float,
    failed: Callable[[], str | None],
) -> HostGroup:
    channels: dict[int, Channel] = {}
    with ExitStack() as stack:
        while len(channels) < num_hosts - 1:
            listener.settimeout(ASK_SECONDS)
            try:
                connection, address = listener.accept()
            except TimeoutError:
                missing = [str(rank) for rank in range(1, num_hosts) if rank not in channels]
                if (reason := failed()) is None and time.monotonic() > end:
                    reason = f"num_hosts={num_hosts}: host {', '.join(missing)} did not come in time"
                if reason is not None:
                    raise MeetingError(reason) from None
                continue
            channel = Channel(connection, SILENCE)
            rank = _greet(channel, num_hosts, channels, facts, f"{address[0]}:{address[1]}")
            if rank is not None:
                channels[rank] = channel
                stack.callback(channel.close)
        port = _free_port(host)
        for channel in channels.values():
            channel.send(Message("welcome", {"port": port}))
        _initialize(host, port, num_hosts, 0)
        stack.pop_all()
    return HostGroup(0, channels)


def _greet(
    channel: Channel, num_hosts: int, known: Mapping[int, Channel], facts: Mapping[str, Any], who: str
) -> int | None:
    """The rank of who has come; None, and it is told why, if it does not belong here."""
    try:
        hello = channel.receive()
        rank = hello.fields.get("rank") if hello.kind == GREETING else None
        if not isinstance(rank, int):
            reasons = [f"{who} speaks another protocol than {GREETING!r}"]
        elif not 0 < rank < num_hosts:
            reasons = [f"host_rank={rank}: must be 1 to {num_hosts - 1}"]
        elif rank in known:
            reasons = [f"host_rank={rank}: another host has come with it"]
        else:
            reasons = differences(facts, hello.fields.get("facts", {}), f"host {rank} ({who})")
        if reasons:
            logger.warning("a host is refused: %s", "; ".join(reasons))
            channel.send(Message("refused", {"reason": "; ".join(reasons)}))
            channel.close()
            return None
    except ChannelClosedError as error:
        logger.warning("%s has come and gone: %s", who, error)
        channel.close()
        return None
    return rank


def _join(
    rank: int, address: tuple[str, int], num_hosts: int, facts: Mapping[str, Any], end: float
) -> HostGroup:
    channel = _reach(address, max(SILENCE, end - time.monotonic()), end)
    try:
        channel.send(Message(GREETING, {"rank": rank, "facts": facts}))
        answer = channel.receive()
    except ChannelClosedError as error:
        channel.close()
        raise MeetingError(f"host 0 at {address[0]}:{address[1]} has hung up: {error}") from error
    if answer.kind != "welcome":
        channel.close()
        raise MeetingError(f"host 0 has refused this host: {answer.fields.get('reason', answer.kind)}")
    _initialize(address[0], answer.fields["port"], num_hosts, rank)
    channel.set_silence(SILENCE)
    return HostGroup(rank, {0: channel})


def _reach(address: tuple[str, int], patience: float, end: float) -> Channel:
    """A channel to host 0, which may still be starting."""
    while True:
        try:
            return Channel.connect(address, patience)
        except OSError as error:
            if time.monotonic() > end:
                raise MeetingError(
                    f"coordinator_address: host 0 is not at {address[0]}:{address[1]} ({error})"
                ) from error
            time.sleep(RETRY_SECONDS)


def _own_address() -> str:
    """The address by which other machines reach this one: where its packets to them come from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent; RFC 5737 keeps the address for examples
            return probe.getsockname()[0]
        except OSError:  # there is no way out of this machine
            return socket.gethostbyname(socket.gethostname())


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise MeetingError(
            f"coordinator_address: host 0 cannot listen at {host}:{port} ({error}); give one of its own"
        ) from error


def _free_port(host: str) -> int:
    with _listen(host, 0) as found:
        return found.getsockname()[1]


def _initialize(host: str, port: int, num_hosts: int, rank: int) -> None:
    if not jax.distributed.is_initialized():
        name = f"[{host}]" if ":" in host else host
        _start_jax(coordinator_address=f"{name}:{port}", num_processes=num_hosts, process_id=rank)


def _set_xla_flag(flag: str) -> None:
    """Gives XLA a flag, which it reads when it is first used."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if flag not in flags:
        os.environ["XLA_FLAGS"] = " ".join([*flags, flag])


def _start_jax(**where: Any) -> None:
    # jax would take SIGTERM for itself, to save checkpoints in time, and the process would not end by it
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**where, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
