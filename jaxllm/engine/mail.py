"""Whose output is it: those of one caller's steps reach the others that wait for them."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jaxllm.engine.core import EngineCore
from jaxllm.engine.outputs import RequestOutput
from jaxllm.engine.replicas import Replicas


class Mail:
    """Sorts what steps give out.

    `generate` calls and streams claim their requests and read them here; whoever else runs a step meanwhile
    leaves their outputs for them. What nobody claims is for the caller who steps the engine himself.
    """

    def __init__(self, core: EngineCore | Replicas) -> None:
        self._core = core
        self._claimed: dict[str, deque[RequestOutput]] = {}
        self._unclaimed: deque[RequestOutput] = deque()

    def advance(self) -> None:
        """Runs one step."""
        for output in self._core.step():
            self._claimed.get(output.request_id, self._unclaimed).append(output)

    def tell_reader(self, output: RequestOutput) -> None:
        """Passes on the last output of a request that was ended from outside, if somebody reads it."""
        if output.request_id in self._claimed:
            self._claimed[output.request_id].append(output)

    def clear(self) -> None:
        """Forgets what nobody has read."""
        self._unclaimed.clear()
        for box in self._claimed.values():
            box.clear()

    @property
    def has_unclaimed(self) -> bool:
        """Whether `take_unclaimed` would give something."""
        return bool(self._unclaimed)

    def take_unclaimed(self) -> list[RequestOutput]:
        """The outputs of requests that nobody reads."""
        taken = list(self._unclaimed)
        self._unclaimed.clear()
        return taken

    @contextmanager
    def reading(self, ids: Sequence[str]) -> Iterator[Iterator[RequestOutput]]:
        """The outputs of some requests, steps being run as they are needed.

        At the end those of the requests that have not finished are aborted.
        """
        box: deque[RequestOutput] = deque()
        self._claimed.update(dict.fromkeys(ids, box))
        try:
            yield self._read(box)
        finally:
            for request_id in ids:
                del self._claimed[request_id]
                self._core.abort(request_id)

    def _read(self, box: deque[RequestOutput]) -> Iterator[RequestOutput]:
        while True:
            while not box:
                self.advance()
            yield box.popleft()
