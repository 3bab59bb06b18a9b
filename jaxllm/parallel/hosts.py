"""Hosts that run one engine together: how they find each other, and notice that one is gone."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxllm.parallel.channel import Channel, ChannelClosedError, Message, encode

logger = logging.getLogger(__name__)

SILENCE = 15.0
"""Seconds without a word after which a host counts as lost: a compiler may hold up its threads, but not so
long."""
HEARTBEAT = 2.0
FAREWELL_SECONDS = 5.0
"""How long host 0 waits for those that it has refused to say that they end: with it ends jax's runtime, which
would end them first and say less."""


class HostLostError(RuntimeError):
    """A host is gone or has failed, and so the others cannot go on."""


class HostGroup:
    """The connections among the hosts of an engine: from host 0 to each of the others.

    Attributes:
        rank: this host's number. Host 0 leads: it plans steps, and the others follow.
        lost: why the group has fallen apart, if it has.
    """

    def __init__(self, rank: int, channels: Mapping[int, Channel]) -> None:
        self.rank = rank
        self.lost: HostLostError | None = None
        self._channels = dict(channels)
        self._arrived: dict[int, queue.SimpleQueue[Message]] = {
            peer: queue.SimpleQueue() for peer in channels
        }
        self._listeners: list[Callable[[], object]] = []
        self._at_end: list[Callable[[], object]] = []
        self._losing = threading.Lock()
        self._closed, self._lost = threading.Event(), threading.Event()
        for peer in channels:
            threading.Thread(
                target=self._listen, args=(peer,), name=f"jaxllm-host-{peer}", daemon=True
            ).start()
        threading.Thread(target=self._beat, name="jaxllm-heartbeat", daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this is host 0."""
        return self.rank == 0

    def when_lost(self, listener: Callable[[], object]) -> None:
        """Has a function called, in some thread, once the group falls apart, or now if it has."""
        with self._losing:
            late = self.lost is not None
            if not late:
                self._listeners.append(listener)
        if late:
            listener()

    def when_ended(self, listener: Callable[[], object]) -> None:
        """Has a function called once the group has fallen apart, or has parted in peace."""
        self._at_end.append(listener)
        self.when_lost(listener)

    def wait_lost(self, seconds: float) -> bool:
        """Waits for the group to fall apart; whether it has."""
        return self._lost.wait(seconds)

    def check(self) -> None:
        """Raises HostLostError if the group has fallen apart."""
        if self.lost is not None:
            raise HostLostError(str(self.lost))

    def send(self, message: Message) -> None:
        """Tells all that this host is connected to.

        Raises:
            HostLostError: one of them is gone.
        """
        self.check()
        data = encode(message)  # once for all: the masks of a step are megabytes
        for peer, channel in self._channels.items():
            try:
                channel.send_encoded(data)
            except ChannelClosedError as error:
                self.lose(f"host {peer} is gone: {error}")
        self.check()

    def receive(self, peer: int = 0) -> Message:
        """The next message of a host.

        Raises:
            HostLostError: the group has fallen apart.
        """
        message = self._arrived[peer].get()
        if message.kind == "lost":
            self.check()
        return message

    def has_arrived(self, peer: int) -> bool:
        """Whether `receive` would not wait."""
        return not self._arrived[peer].empty()

    def agree(self, facts: Mapping[str, Any], least: Mapping[str, int]) -> dict[str, int]:
        """Compares what must be the same on all hosts, and takes the least of some numbers.

        Returns:
            For each of `least` the least of all hosts.

        Raises:
            ValueError: a fact differs; it says which, and on which host.
            HostLostError: the group has fallen apart.
        """
        if not self.leads:
            self.send(Message("facts", {"facts": facts, "least": least}))
            answer = self.receive()
            if answer.kind == "refused":
                raise ValueError(answer.fields["reason"])
            return dict(answer.fields["least"])
        found, reasons = dict(least), []
        for peer in self._channels:
            told = self.receive(peer).fields
            reasons += differences(facts, told["facts"], f"host {peer}")
            found = {name: min(value, told["least"][name]) for name, value in found.items()}
        if reasons:
            reason = "; ".join(reasons)
            self.send(Message("refused", {"reason": reason}))
            self.wait_lost(FAREWELL_SECONDS)
            raise ValueError(reason)
        self.send(Message("agreed", {"least": found}))
        return found

    def fail(self, reason: str) -> None:
        """This host cannot go on; tells the others why."""
        with contextlib.suppress(HostLostError):
            self.send(Message("failed", {"reason": reason}))
        self.lose(f"host {self.rank} has failed: {reason}")

    def lose(self, reason: str) -> None:
        """The group has fallen apart; tells those who wait, and the other hosts by hanging up."""
        with self._losing:
            if self.lost is not None or self._closed.is_set():
                return
            self.lost = HostLostError(reason)
            listeners = list(self._listeners)
        self._lost.set()
        logger.error("%s; the engine ends on all hosts", reason)
        for arrived in self._arrived.values():
            arrived.put(Message("lost"))
        self._hang_up()
        for listener in listeners:
            listener()

    def close(self) -> None:
        """Parts in peace; the other hosts do so, too, when they have done what they were told before.

        Where jax's processes meet is closed with it: nothing can run on several hosts afterwards.
        """
        if self.lost is not None or self._closed.is_set():
            return
        with contextlib.suppress(HostLostError):
            self.send(Message("bye"))
        self._closed.set()
        if self.lost is None:
            jax.distributed.shutdown()
        self._hang_up()
        for listener in self._at_end:
            listener()

    def _hang_up(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _listen(self, peer: int) -> None:
        channel = self._channels[peer]
        try:
            while True:
                message = channel.receive()
                if message.kind == "failed":
                    self.lose(f"host {peer} has failed: {message.fields.get('reason')}")
                    return
                if message.kind != "alive":
                    self._arrived[peer].put(message)
                if message.kind == "bye":
                    return
        except ChannelClosedError as error:
            self.lose(f"host {peer} is gone: {error}")

    def _beat(self) -> None:
        while self.lost is None and not self._closed.wait(HEARTBEAT):
            with contextlib.suppress(HostLostError):
                self.send(Message("alive"))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], who: str) -> list[str]:
    """What differs between two hosts, in words."""
    return [
        f"{name} is {theirs.get(name)!r} on {who} and {ours.get(name)!r} on host 0"
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]
