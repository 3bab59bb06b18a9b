"""The engine for many callers: the step loop runs in a thread, answers arrive in asyncio."""

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from jax.sharding import Mesh

from jaxllm.config import EngineConfig
from jaxllm.engine.chat import Conversation
from jaxllm.engine.core import EngineFailedError, RequestFailedError
from jaxllm.engine.engine import Engine
from jaxllm.engine.inputs import EngineInput, Prompt, TokensPrompt
from jaxllm.engine.metrics import Metrics
from jaxllm.engine.output_stream import OutputStream, post
from jaxllm.engine.outputs import RequestOutput
from jaxllm.engine.replicating import load_engine
from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.parallel.hosts import HostGroup
from jaxllm.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Health = Literal["running", "sleeping", "failed", "closed"]
T = TypeVar("T")


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
        self._streams: dict[str, OutputStream] = {}
        self._ids = itertools.count()
        self._closed = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._loop, name="jaxllm-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_pretrained(cls, model: str, *, mesh: Mesh | None = None, **options: Any) -> Self:
        """Loads a model; arguments and errors are those of `Engine.from_pretrained`."""
        return cls(Engine(load_engine(EngineConfig.create(model, **options), mesh)))

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

        Those that come while the caller is busy are joined into one.

        Raises:
            ValueError, TypeError: a prompt or parameter that cannot be served, or an id in use.
            RequestFailedError: something broke while it ran.
            EngineFailedError: the engine has failed.
            RuntimeError: it is closed or sleeps.
        """
        input = await self.make_input(prompt, params, priority=priority, **input_options)
        async with await self.submit({request_id or f"async-{next(self._ids)}": input}) as stream:
            while not stream.finished:
                for output in await stream.take():
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
        prompt = await self.render_chat(messages, **template_options)
        answer = self.generate(prompt, params, request_id=request_id, priority=priority)
        async with aclosing(answer) as outputs:
            async for output in outputs:
                yield output

    async def make_input(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> EngineInput:
        """Tokenizes and checks a request in a thread; see `InputProcessor.make`."""
        return await asyncio.to_thread(self._engine.make_input, prompt, params, **options)

    async def render_chat(self, messages: Conversation, **template_options: Any) -> TokensPrompt:
        """A conversation as a prompt, made in a thread; see `InputProcessor.render_chat`."""
        return await asyncio.to_thread(self._engine.render_chat, messages, **template_options)

    async def submit(self, inputs: Mapping[str, EngineInput]) -> OutputStream:
        """Starts requests that `make_input` made, all of them or none.

        Args:
            inputs: the requests by their ids.

        Returns:
            Where their outputs arrive. Close it, or the requests run to their ends.

        Raises:
            ValueError: an id in use, or a request that can never fit.
            EngineFailedError: the engine has failed.
            RuntimeError: it is closed or sleeps.
        """
        stream = OutputStream(inputs, self._close_soon)
        try:
            await self._call(lambda: self._add(inputs, stream))
        except asyncio.CancelledError:  # the thread may have added them already
            stream.close()
            raise
        return stream

    async def abort(self, request_id: str) -> bool:
        """Ends a request; its stream gives a last output with the finish reason "abort".

        Returns:
            False if there is no such request.
        """
        return await self._call(lambda: self._abort(request_id))

    def _close_soon(self, stream: OutputStream) -> None:
        self._send(lambda: [self._abort(i) for i in stream.request_ids if self._streams.get(i) is stream])

    # The engine itself

    @property
    def health(self) -> Health:
        """Whether it can serve, and if not, why."""
        if self._closed:
            return "closed"
        if self._failure is not None or self._engine.failure is not None:
            return "failed"
        return "sleeping" if self._engine.is_sleeping else "running"

    @property
    def hosts(self) -> HostGroup | None:
        """See `Engine.hosts`."""
        return self._engine.hosts

    @property
    def config(self) -> EngineConfig:
        """What the engine was told."""
        return self._engine.config

    @property
    def default_params(self) -> SamplingParams:
        """See `Engine.default_params`."""
        return self._engine.default_params

    @property
    def max_model_len(self) -> int:
        """See `Engine.max_model_len`."""
        return self._engine.max_model_len

    @property
    def max_num_seqs(self) -> int:
        """See `Engine.max_num_seqs`."""
        return self._engine.max_num_seqs

    @property
    def metrics(self) -> Metrics:
        """See `Engine.metrics`. Numbers may change while they are read."""
        return self._engine.metrics

    @property
    def vocabulary(self) -> Vocabulary | None:
        """See `Engine.vocabulary`."""
        return self._engine.vocabulary

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer; see `Engine.get_tokenizer`."""
        return self._engine.get_tokenizer()

    def get_metrics(self) -> dict[str, float]:
        """See `Engine.get_metrics`."""
        return self._engine.get_metrics()

    def get_replica_metrics(self) -> dict[str, dict[str, float]]:
        """See `Engine.get_replica_metrics`."""
        return self._engine.get_replica_metrics()

    @property
    def replica_metrics(self) -> tuple[Metrics, ...]:
        """See `Engine.replica_metrics`. Numbers may change while they are read."""
        return self._engine.replica_metrics

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
        self._deliver(self._engine.abort_all())
        self._engine.close()
        while not self._commands.empty():  # these came too late, and the engine tells them so
            if (command := self._commands.get()) is not None:
                command()

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except Exception as error:  # no request's fault: those the engine ends itself
            logger.exception("the step loop has failed; all requests end with errors")
            self._failure = error
            self._engine.abort_all()
            failed = EngineFailedError(f"the step loop has failed: {error}")
            post((stream, request_id, failed) for request_id, stream in self._streams.items())
            self._streams.clear()
            return
        self._deliver(outputs)

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        letters = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if output.finished:
                self._streams.pop(output.request_id, None)
            if stream is not None:
                failed = any(sample.finish_reason == "error" for sample in output.outputs)
                item = self._error(output.request_id) if failed else output
                letters.append((stream, output.request_id, item))
        post(letters)

    def _error(self, request_id: str) -> Exception:
        kind = RequestFailedError if self._engine.failure is None else EngineFailedError
        error = kind(f"{request_id} failed: {self._engine.last_error}")
        error.__cause__ = self._engine.last_error
        return error

    def _add(self, inputs: Mapping[str, EngineInput], stream: OutputStream) -> None:
        if self._failure is not None:
            raise EngineFailedError("the step loop has failed; make another engine") from self._failure
        added = []
        try:
            for request_id, input in inputs.items():
                self._engine.add_input(request_id, input)
                added.append(request_id)
        except Exception:
            for request_id in added:
                self._engine.abort_request(request_id)
            raise
        self._streams.update(dict.fromkeys(inputs, stream))

    def _abort(self, request_id: str) -> bool:
        output = self._engine.abort_request(request_id)
        if output is not None:
            self._deliver([output])
        return output is not None
