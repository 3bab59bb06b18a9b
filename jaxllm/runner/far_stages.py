"""A pipeline's stages on other hosts: how hidden states come and go, and how results get to host 0."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array

from jaxllm.parallel.channel import Message
from jaxllm.parallel.hosts import HostGroup, HostLostError
from jaxllm.runner.link import Link

REASON_SECONDS = 1.0
"""A step fails a moment before a connection says which host is gone, and less clearly."""
POLL_SECONDS = 0.05
"""How often it is looked, while the last steps end, whether a host is lost that holds them up."""


class FarArray:
    """What another host computes, on its way to this one's memory."""

    def __init__(self, far: "FarStages", length: int) -> None:
        self._far = far
        self._length = length
        self.value: np.ndarray | None = None

    def __len__(self) -> int:
        return self._length

    def copy_to_host_async(self) -> None:
        """It comes by itself."""

    def is_ready(self) -> bool:
        """Whether reading it would not wait."""
        return self._far.is_there(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Waits for it; raises HostLostError if a host is lost before."""
        return np.array(self._far.wait(self), dtype, copy=copy)


class FarStages:
    """What this host has to do with the stages on others.

    The host with the last stage reads what that has sampled, and sends it to host 0, in the order in which it
    was started. Each host looks at what its own stages have computed: if that has failed, others wait for it.

    Args:
        hosts: the group.
        reporter: which host sends what the last stage has computed.
        entry: brings hidden states to this host's first stage, if they come from another host.
        exit: takes them from this host's last stage, if they go to one.
    """

    def __init__(self, hosts: HostGroup, reporter: int, *, entry: Link | None, exit: Link | None) -> None:
        self.entry = entry
        self.exit = exit
        self._hosts = hosts
        self._reporter = reporter
        self._expected: deque[Sequence[FarArray]] = deque()
        self._begun: queue.SimpleQueue[tuple[Sequence[Array], bool] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._look, name="jaxllm-report", daemon=True)
        self._thread.start()

    @property
    def links(self) -> list[Link]:
        """Those that there are."""
        return [link for link in (self.entry, self.exit) if link is not None]

    def expect(self, count: int, length: int) -> tuple[Array, ...]:
        """The next arrays of a length another host reports, to be read like jax's; only host 0 gets them."""
        arrays = tuple(FarArray(self, length) for _ in range(count))
        if self._hosts.leads:
            self._expected.append(arrays)
        return cast(tuple[Array, ...], arrays)

    def report(self, arrays: Sequence[Array]) -> None:
        """Sends host 0 what the last stage computes, if that is this host's to do."""
        self._begun.put((arrays, self._hosts.rank == self._reporter))

    def watch(self, array: Array) -> None:
        """Ends the group if this cannot be computed."""
        self._begun.put(((array,), False))

    def close(self) -> None:
        """Ends the thread when what has begun is done, and waits for that unless a host is lost.

        A process that ends while one of its threads is inside of jax may abort.
        """
        self._begun.put(None)
        if self._thread is not threading.current_thread():  # where the garbage collector closes an engine
            while self._thread.is_alive() and self._hosts.lost is None:
                self._thread.join(POLL_SECONDS)

    def is_there(self, array: FarArray) -> bool:
        """Whether an array has come, or never will."""
        with contextlib.suppress(HostLostError):
            while array.value is None and self._hosts.has_arrived(self._reporter):
                self._take()
        return array.value is not None or self._hosts.lost is not None

    def wait(self, array: FarArray) -> np.ndarray:
        """The array, when it has come.

        Raises:
            HostLostError: a host is lost.
        """
        while array.value is None:
            self._hosts.check()
            self._take()
        return array.value

    def _take(self) -> None:
        message = self._hosts.receive(self._reporter)
        for array, value in zip(self._expected.popleft(), message.arrays, strict=True):
            array.value = value

    def _look(self) -> None:
        while (begun := self._begun.get()) is not None and self._finish(*begun):
            del begun  # so the devices have its memory back now, and not with the next step

    def _finish(self, arrays: Sequence[Array], is_told: bool) -> bool:
        """Waits for arrays, and sends them if that is to be; whether the group goes on."""
        try:
            found = [np.asarray(a) for a in arrays] if is_told else jax.block_until_ready(arrays)
            if is_told:
                self._hosts.send(Message("result", {}, cast(Sequence[np.ndarray], found)))
        except HostLostError:
            return False
        except Exception as error:
            if not self._hosts.wait_lost(REASON_SECONDS):
                self._hosts.fail(f"a step failed: {error}")
            return False
        return True
