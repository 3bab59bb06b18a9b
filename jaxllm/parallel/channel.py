"""Messages between hosts over TCP: a few fields as JSON, and arrays as bytes. Nothing received is run."""

import contextlib
import json
import math
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

_SIZES = struct.Struct(">IQ")
"""Before each message: bytes of its JSON, and of its arrays."""
MAX_JSON, MAX_ARRAYS = 1 << 20, 1 << 32
"""Most bytes of a message's parts; what claims to be larger does not come from a host."""


class ChannelClosedError(Exception):
    """The other side has gone, or says nothing any more, or what it says is no message."""


@dataclass(frozen=True)
class Message:
    """What one host tells another."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Anything that JSON can carry."""
    arrays: Sequence[np.ndarray] = ()
    """Of numbers or bools."""


def encode(message: Message) -> bytes:
    """A message as it is sent."""
    about = [[array.dtype.str, array.shape] for array in message.arrays]
    text = json.dumps([message.kind, message.fields, about], separators=(",", ":")).encode()
    size = sum(array.nbytes for array in message.arrays)
    return b"".join([_SIZES.pack(len(text), size), text, *(array.tobytes() for array in message.arrays)])


def decode(text: bytes, data: bytes) -> Message:
    """The inverse of `encode`, of a message's two parts.

    Raises:
        ValueError: they are no message.
    """
    kind, fields, about = json.loads(text)
    arrays, begin = [], 0
    for name, shape in about:
        dtype = np.dtype(name)
        if dtype.kind not in "biuf":
            raise ValueError(f"an array of {name}: only numbers and bools are sent")
        count = math.prod(shape)
        arrays.append(np.frombuffer(data, dtype, count, begin).reshape(shape))
        begin += count * dtype.itemsize
    return Message(kind, fields, arrays)


class Channel:
    """One side of a connection. Several threads may send; one may receive.

    Args:
        connection: open already.
        silence: seconds without a message after which the other side counts as gone.
    """

    def __init__(self, connection: socket.socket, silence: float) -> None:
        connection.settimeout(silence)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._silence = silence
        self._sending = threading.Lock()

    @classmethod
    def connect(cls, address: tuple[str, int], silence: float) -> Self:
        """Opens one to a host that listens.

        Raises:
            OSError: nobody does.
        """
        return cls(socket.create_connection(address, timeout=silence), silence)

    def set_silence(self, seconds: float) -> None:
        """Changes how long the other side may say nothing."""
        self._silence = seconds
        self._connection.settimeout(seconds)

    def send(self, message: Message) -> None:
        """Sends a message; waits while the other side has not taken those before.

        Raises:
            ChannelClosedError: the other side has gone.
        """
        self.send_encoded(encode(message))

    def send_encoded(self, data: bytes) -> None:
        """The same, of what `encode` has made of a message: for one that goes to several hosts."""
        try:
            with self._sending:
                self._connection.sendall(data)
        except OSError as error:
            raise ChannelClosedError(str(error) or type(error).__name__) from error

    def receive(self) -> Message:
        """The next message.

        Raises:
            ChannelClosedError: the other side has gone.
        """
        try:
            text_size, data_size = _SIZES.unpack(self._read(_SIZES.size))
            if text_size > MAX_JSON or data_size > MAX_ARRAYS:
                raise ValueError("it is too large")
            return decode(self._read(text_size), self._read(data_size))
        except TimeoutError as error:
            raise ChannelClosedError(f"it has said nothing for {self._silence:g} s") from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ChannelClosedError(str(error) or type(error).__name__) from error

    def close(self) -> None:
        """Closes it, which ends a `receive` that another thread is in. Twice does nothing."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._connection.recv_into(view)
            if not count:
                raise ChannelClosedError("the connection was closed")
            view = view[count:]
        return bytes(data)
