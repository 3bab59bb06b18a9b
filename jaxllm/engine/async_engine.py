"""The engine for many callers: the step loop runs in a thread, answers arrive in asyncio."""

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import aclosing, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from jax.sharding import Mesh

from jaxllm.cache.pages import Occupancy
from jaxllm.config import EngineConfig
from jaxllm.engine.chat import Conversation
from jaxllm.engine.core import EngineFailedError, RequestFailedError
from jaxllm.engine.engine import Engine
from jaxllm.engine.inputs import EngineInput, Prompt, TokensPrompt
from jaxllm.engine.metrics import Metrics
from jaxllm.engine.output_stream import OutputStream, post
from jaxllm.engine.outputs import RequestOutput
from jaxllm.engine.replicating import load_engine
from jaxllm.engine.restarts import MOST_RESTARTS, WINDOW_SECONDS, RestartBudget
from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.parallel.hosts import HostGroup
from jaxllm.sampling import SamplingParams
from jaxllm.structured.compiler import COMPILE_SECONDS, LATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Health = Literal["running", "sleeping", "restarting", "failed", "closed"]
T = TypeVar("T")


class AsyncEngine:
    """Serves many requests at a time.

        async with AsyncEngine.from_pretrained("smollm2-135m-instruct") as engine:
            async for output in engine.generate("The capital of France is"):
                print(output.outputs[0].text)

    One thread owns the engine and does its steps; everything else is sent to it. A caller that stops
    listening, or is cancelled, ends its request and no other. If a step fails, the requests in it raise
    `RequestFailedError` and the loop goes on. If that happens again and again, or the loop itself fails, all
    requests raise `EngineFailedError`, and the engine starts over without compiling anything. If that, too,
    happens again and again, `health` is "failed" and stays so. Replicas start over each by itself first.

    Args:
        engine: it belongs to the thread from now on.
        max_restarts: how often it may start over within `restart_window` seconds, and each replica may.
    """

    def __init__(
        self, engine: Engine, *, max_restarts: int = MOST_RESTARTS, restart_window: float = WINDOW_SECONDS
    ) -> None:
        self._engine = engine
        engine.limit_restarts(max_restarts, restart_window)
        self._restarts = RestartBudget(max_restarts, restart_window)
        self._restarting = False
        self._stop = threading.Event()
        if engine.hosts is not None:  # which cannot go on without one another
            engine.hosts.when_lost(self._stop.set)
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
        """Tokenizes and checks a request in a thread; see `InputProcessor.make`.

        A grammar that takes long to compile is waited for here, so that it keeps no thread from others.
        """
        if (grammar := self._engine.begin_grammar(params)) is not None:
            compiled = asyncio.wrap_future(grammar)
            compiled.add_done_callback(lambda done: done.cancelled() or done.exception())  # `make` raises it
            await asyncio.wait([compiled], timeout=COMPILE_SECONDS)
            if not compiled.done() and params is not None and params.structured_outputs is not None:
                raise ValueError(LATE.format(params.structured_outputs.constraint))
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
        def close() -> None:
            for request_id in stream.request_ids:
                if self._streams.get(request_id) is stream:
                    self._abort(request_id)

        self._commands.put(close)  # nobody waits for it: if it fails, the loop has to know

    # The engine itself

    @property
    def health(self) -> Health:
        """Whether it can serve, and if not, why."""
        if self._closed:
            return "closed"
        if self._failure is not None or not self._thread.is_alive():
            return "failed"
        if self._restarting or not self._engine.num_serving:
            return "restarting"
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
    def num_serving(self) -> int:
        """See `Engine.num_serving`."""
        return self._engine.num_serving

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

    def page_occupancy(self, most_runs: int) -> Occupancy:
        """See `Engine.page_occupancy`."""
        return self._engine.page_occupancy(most_runs)

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
            self._stop.set()
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
        while True:
            try:
                self._serve()
                break
            except Exception as error:
                self._start_over(error)
        try:
            self._deliver(self._engine.abort_all())
        except Exception as error:
            self._tell_all(error)
        self._engine.close()
        while not self._commands.empty():  # these came too late, and the engine tells them so
            if (command := self._commands.get()) is not None:
                command()

    def _serve(self) -> None:
        """Does what it is sent, and steps in between, until it is to end."""
        while (command := self._commands.get()) is not None:
            command()
            while self._has_work() and self._commands.empty():
                self._deliver(self._engine.step())
                if self._engine.failure is not None:
                    raise self._engine.failure

    def _has_work(self) -> bool:
        if self._failure is not None:
            return False  # while no replica serves, a step finds out what becomes of them
        return self._engine.has_unfinished_requests() or not self._engine.num_serving

    def _start_over(self, error: Exception) -> None:
        """Tells all who wait, and makes the engine as new, unless that has happened too often."""
        logger.error("the step loop has failed; all requests end with errors", exc_info=error)
        self._restarting = True
        self._tell_all(error)
        if (hosts := self._engine.hosts) is not None and hosts.lost is not None:
            self._stop.set()  # its listeners are told a moment after those who ask
        self._failure = self._restarts.start_over("the engine", self._engine.restart, error, self._stop)
        self._restarting = False
        if self._failure is not None:
            with suppress(Exception):  # nobody waits for its requests any more
                self._engine.abort_all()

    def _tell_all(self, error: Exception) -> None:
        """Has every stream raise."""
        failed = EngineFailedError(f"the step loop has failed: {error}")
        failed.__cause__ = error
        streams, self._streams = self._streams, {}
        post((stream, request_id, failed) for request_id, stream in streams.items())

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        letters, finished = [], []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if output.finished:
                finished.append(output.request_id)
            if stream is not None:
                failed = any(sample.finish_reason == "error" for sample in output.outputs)
                letters.append((stream, output.request_id, self._error(output) if failed else output))
        post(letters)
        for request_id in finished:  # not before: if it fails, they are still to be told
            self._streams.pop(request_id, None)

    def _error(self, output: RequestOutput) -> Exception:
        if isinstance(output.error, ValueError):  # what was asked for cannot be served
            return output.error
        kind = RequestFailedError if self._engine.failure is None else EngineFailedError
        error = kind(f"{output.request_id} failed: {self._engine.last_error}")
        error.__cause__ = self._engine.last_error
        return error

    def _add(self, inputs: Mapping[str, EngineInput], stream: OutputStream) -> None:
        if self._failure is not None:
            raise EngineFailedError("the engine has failed too often; make another") from self._failure
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
