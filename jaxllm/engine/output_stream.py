"""Outputs on their way from the engine's thread to the task that waits for them."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Self

from jaxllm.engine.inputs import EngineInput
from jaxllm.engine.outputs import RequestOutput, join
from jaxllm.sampling import RequestOutputKind

logger = logging.getLogger(__name__)


class OutputStream:
    """The outputs of one request or of several, for one task.

        async with await engine.submit({"my-request": input}) as stream:
            while not stream.finished:
                for output in await stream.take():
                    print(output.outputs[0].text)

    What arrives while nobody takes it is joined: a slow reader costs one output a request, however late it
    is, and holds nobody up. A stream that is closed before it has finished ends its requests.

    Args:
        inputs: the requests by their ids.
        abort: called with the stream when its requests are to be ended.
    """

    def __init__(self, inputs: Mapping[str, EngineInput], abort: Callable[["OutputStream"], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.request_ids = tuple(inputs)
        self._kinds = {request_id: input.params.output_kind for request_id, input in inputs.items()}
        self._unfinished = set(inputs)
        self._pending: dict[str, RequestOutput] = {}
        self._error: Exception | None = None
        self._arrived = asyncio.Event()
        self._abort = abort
        self._closed = False

    @property
    def finished(self) -> bool:
        """Whether the last output of every request has been taken."""
        return not self._unfinished and not self._pending and self._error is None

    async def take(self) -> list[RequestOutput]:
        """What is new, at most one output a request; waits until there is something.

        Raises:
            RequestFailedError: something broke while one of the requests ran.
            EngineFailedError: the engine has failed.
        """
        await self._arrived.wait()
        self._arrived.clear()
        if self._error is not None:
            raise self._error
        outputs = list(self._pending.values())
        self._pending.clear()
        return outputs

    def put(self, request_id: str, item: RequestOutput | Exception) -> None:
        """Adds what the engine gives out; called in the loop that the stream was made in."""
        if isinstance(item, Exception):
            self._unfinished.discard(request_id)
            self._error = item
        else:
            if self._kinds[request_id] is RequestOutputKind.DELTA and request_id in self._pending:
                self._pending[request_id] = join(self._pending[request_id], item)
            else:
                self._pending[request_id] = item
            if item.finished:
                self._unfinished.discard(request_id)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """Has `take` raise an error. The requests still run, until the stream is closed."""
        self._error = error
        self._arrived.set()

    def close(self) -> None:
        """Ends the requests that have not finished. Closing twice does nothing."""
        if self._unfinished and not self._closed:
            self._abort(self)
        self._closed = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


Letter = tuple[OutputStream, str, RequestOutput | Exception]
"""A stream, a request's id, and what there is for it."""


def post(letters: Iterable[Letter]) -> None:
    """Brings a step's outputs to their streams: one call into each event loop, from any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Letter]] = {}
    for letter in letters:
        by_loop.setdefault(letter[0].loop, []).append(letter)
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, own)
        except RuntimeError:  # the loop is closed, and so nobody waits
            continue


def _put_all(letters: Iterable[Letter]) -> None:
    for stream, request_id, item in letters:
        try:
            stream.put(request_id, item)
        except Exception as error:  # those after it are somebody else's
            logger.exception("an output of request %r could not be delivered", request_id)
            stream.fail(error)
