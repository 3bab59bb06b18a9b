"""The engine for many callers: the step loop runs in a thread, answers arrive in asyncio."""

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from jax.sharding import Mesh

from jaxllm.config import EngineConfig
from jaxllm.engine.chat import Conversation
from jaxllm.engine.core import EngineFailedError, RequestFailedError
from jaxllm.engine.engine import Engine
from jaxllm.engine.inputs import EngineInput, Prompt
from jaxllm.engine.loading import load_parts
from jaxllm.engine.outputs import RequestOutput
from jaxllm.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Health = Literal["running", "sleeping", "failed", "closed"]
T = TypeVar("T")


@dataclass(frozen=True)
class Listener:
    """Where a request's outputs go: a queue of the event loop that asked."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[RequestOutput | Exception]

    def send(self, item: RequestOutput | Exception) -> None:
        """Called in the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, item)
        except RuntimeError:  # the loop is closed, and so nobody waits
            return


class AsyncEngine:
    """Serves many requests at a time.

        async with AsyncEngine.from_pretrained("smollm2-135m-instruct") as engine:
            async for output in engine.generate("The capital of France is"):
                print(output.outputs[0].text)

    One thread owns the engine and does its steps; everything else is sent to it. A caller that stops
    listening, or is cancelled, ends its request and no other. If a step fails, the requests in it raise
    `RequestFailedError` and the loop goes on; if that happens again and again, `health` is "failed" and
    everybody is told.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._ids = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="jaxllm-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_pretrained(cls, model: str, *, mesh: Mesh | None = None, **options: Any) -> Self:
        """Loads a model; arguments and errors are those of `Engine.from_pretrained`."""
        return cls(Engine(load_parts(EngineConfig.create(model, **options), mesh)))

    # Requests

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        **input_options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes a prompt and yields its outputs as they grow, of the kind that `params.output_kind` says.

        Raises:
            ValueError, TypeError: a prompt or parameter that cannot be served, or an id in use.
            RequestFailedError: something broke while it ran.
            EngineFailedError: the engine has failed.
            RuntimeError: it is closed or sleeps.
        """
        make = self._engine.make_input
        input = await asyncio.to_thread(make, prompt, params, priority=priority, **input_options)
        async with aclosing(self._listen(request_id or f"async-{next(self._ids)}", input)) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Conversation,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        **template_options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers a conversation as `generate` completes a prompt; template options as for `Engine.chat`."""
        prompt = await asyncio.to_thread(self._engine.render_chat, messages, **template_options)
        answer = self.generate(prompt, params, request_id=request_id, priority=priority)
        async with aclosing(answer) as outputs:
            async for output in outputs:
                yield output

    async def abort(self, request_id: str) -> bool:
        """Ends a request; its generator gives a last output with the finish reason "abort".

        Returns:
            False if there is no such request.
        """
        return await self._call(lambda: self._abort(request_id))

    async def _listen(self, request_id: str, input: EngineInput) -> AsyncGenerator[RequestOutput, None]:
        listener = Listener(asyncio.get_running_loop(), asyncio.Queue())
        await self._call(lambda: self._add(request_id, input, listener))
        finished = False
        try:
            while not finished:
                item = await listener.outputs.get()
                if isinstance(item, Exception):
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                self._send(lambda: self._abort(request_id))

    # The engine itself

    @property
    def health(self) -> Health:
        """Whether it can serve, and if not, why."""
        if self._closed:
            return "closed"
        if self._engine.failure is not None:
            return "failed"
        return "sleeping" if self._engine.is_sleeping else "running"

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer; see `Engine.get_tokenizer`."""
        return self._engine.get_tokenizer()

    def get_metrics(self) -> dict[str, float]:
        """See `Engine.get_metrics`."""
        return self._engine.get_metrics()

    async def wait_for_programs(self, timeout: float | None = None) -> bool:
        """See `Engine.wait_for_programs`."""
        return await asyncio.to_thread(self._engine.wait_for_programs, timeout)

    async def reset_prefix_cache(self) -> bool:
        """See `Engine.reset_prefix_cache`."""
        return await self._call(self._engine.reset_prefix_cache)

    async def sleep(self, level: int = 1) -> None:
        """See `Engine.sleep`."""
        await self._call(lambda: self._engine.sleep(level))

    async def wake_up(self) -> None:
        """See `Engine.wake_up`."""
        await self._call(self._engine.wake_up)

    def close(self) -> None:
        """Ends all requests with the finish reason "abort" once a running step is done; frees the device."""
        if not self._closed:
            self._closed = True
            self._commands.put(None)
            self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # To the thread

    def _send(self, command: Callable[[], object]) -> Future[Any]:
        """Has the thread call something between two steps."""
        result: Future[Any] = Future()

        def run() -> None:
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(command())
                except Exception as error:
                    result.set_exception(error)

        self._commands.put(run)
        return result

    async def _call(self, command: Callable[[], T]) -> T:
        if self._closed:
            raise RuntimeError("the engine is closed; make another")
        return await asyncio.wrap_future(self._send(command))

    # In the thread

    def _loop(self) -> None:
        while (command := self._commands.get()) is not None:
            command()
            while self._engine.has_unfinished_requests() and self._commands.empty():
                self._step()
        for output in self._engine.abort_all():
            self._deliver(output)
        self._engine.close()
        while not self._commands.empty():  # these came too late, and the engine tells them so
            if (command := self._commands.get()) is not None:
                command()

    def _step(self) -> None:
        for output in self._engine.step():
            self._deliver(output)

    def _deliver(self, output: RequestOutput) -> None:
        listener = self._listeners.get(output.request_id)
        if output.finished:
            self._listeners.pop(output.request_id, None)
        if listener is not None:
            failed = any(sample.finish_reason == "error" for sample in output.outputs)
            listener.send(self._error(output.request_id) if failed else output)

    def _error(self, request_id: str) -> Exception:
        kind = RequestFailedError if self._engine.failure is None else EngineFailedError
        error = kind(f"{request_id} failed: {self._engine.last_error}")
        error.__cause__ = self._engine.last_error
        return error

    def _add(self, request_id: str, input: EngineInput, listener: Listener) -> None:
        self._engine.add_input(request_id, input)
        self._listeners[request_id] = listener

    def _abort(self, request_id: str) -> bool:
        output = self._engine.abort_request(request_id)
        if output is not None:
            self._deliver(output)
        return output is not None
