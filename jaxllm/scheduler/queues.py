"""Requests that wait for a row. No operation's cost grows with how many wait, beyond the heap's logarithm."""

import heapq
from collections import OrderedDict
from typing import Protocol

from jaxllm.scheduler.request import Request


class WaitingQueue(Protocol):
    """Requests in the order in which they are to be admitted."""

    def __len__(self) -> int: ...

    def push(self, request: Request) -> None:
        """Puts a request in its place: a new one, or a preempted one that comes back."""
        ...

    def peek(self) -> Request:
        """The first request. Raises IndexError if none waits."""
        ...

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is. Raises KeyError if it does not wait."""
        ...


class FcfsQueue:
    """In order of arrival.

    A preempted request goes back to the front: all who wait arrived after everybody who has been running.
    """

    def __init__(self) -> None:
        self._requests: OrderedDict[int, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def push(self, request: Request) -> None:
        self._requests[request.arrival] = request
        if request.num_preemptions:
            self._requests.move_to_end(request.arrival, last=False)

    def peek(self) -> Request:
        if not self._requests:
            raise IndexError("no request waits")
        return next(iter(self._requests.values()))

    def remove(self, request: Request) -> None:
        del self._requests[request.arrival]


class PriorityQueue:
    """Lowest priority value first, in order of arrival among equals.

    Removed requests stay in the heap, unseen, until they come to its top or outnumber the others.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._waiting: set[int] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: Request) -> None:
        self._waiting.add(request.arrival)
        heapq.heappush(self._heap, (request.priority, request.arrival, request))

    def peek(self) -> Request:
        if not self._waiting:
            raise IndexError("no request waits")
        return self._heap[0][2]

    def remove(self, request: Request) -> None:
        self._waiting.remove(request.arrival)
        if len(self._heap) > 2 * len(self._waiting):
            self._heap = [entry for entry in self._heap if entry[1] in self._waiting]
            heapq.heapify(self._heap)
        while self._heap and self._heap[0][1] not in self._waiting:
            heapq.heappop(self._heap)
