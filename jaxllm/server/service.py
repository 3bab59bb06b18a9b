"""What all endpoints share: the engine, whether it can be asked, and how many may ask."""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry

from converters.errors import CheckpointError
from converters.tokenizer import longest_token
from jaxllm.config import EngineConfig
from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.engine.metrics import Histogram
from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.server.config import AnswerConfig, ServerConfig
from jaxllm.server.errors import ApiError, unavailable
from jaxllm.server.infilling import Infilling
from jaxllm.server.profiling import Profiler
from jaxllm.server.reasoning_parsers import REASONING_PARSERS
from jaxllm.server.registry import load_plugin
from jaxllm.server.response_store import ResponseStore
from jaxllm.server.startup import Startup
from jaxllm.server.tool_parsers import TOOL_PARSERS
from jaxllm.server.tracing import Tracing

logger = logging.getLogger(__name__)

Status = Literal["loading", "ready", "sleeping", "restarting", "draining", "failed"]


POLL_SECONDS = 0.02
FAREWELL_SECONDS = 5.0
"""How long a server waits for its answers to end when a host is lost."""
ASKED_BOUNDS = tuple(base * 10.0**power for power in range(6) for base in (1.0, 2.0, 5.0))


class Ticket:
    """Places that a request holds in the queue, from its arrival until it is given back."""

    def __init__(self, service: "Service", outputs: int) -> None:
        self._service, self._outputs = service, outputs

    def give_back(self) -> None:
        """Makes room for others. A second time it does nothing."""
        self._service.active -= self._outputs
        self._outputs = 0


class Service:
    """The engine and its state, for one server.

    Attributes:
        config: what the server was told.
        started: when, in seconds since 1970.
        active: outputs that are being made or wait, of all requests together.
        requests: requests for text that have not been answered to the end.
        draining: whether the server is about to stop.
        failure: why the model could not be loaded.
        host_lost: whether another host that the engine ran on is gone.
        on_failure: called in either case.
        on_loaded: called with the engine in the thread that has loaded it, before it is used.
        asked: what requests gave as n and max_tokens.
        responses: answers that are kept.
        profiler: records profiles.
        tracing: makes traces of requests, if anybody wants them.
        registry: what `/metrics` shows; the server's own, so that two in a process do not share counts.
    """

    def __init__(self, config: ServerConfig, engine_config: EngineConfig) -> None:
        self.config = config
        self.engine_config = engine_config
        self.names = tuple(config.access.served_model_name) or (engine_config.model.model,)
        self.chat_template = read_template(config.access.chat_template)
        find_parsers(config.answer)
        self.started = int(time.time())
        self.active = 0
        self.requests = 0
        self.draining = False
        self.failure: Exception | None = None
        self.host_lost = False
        self.on_failure: Callable[[], object] = lambda: None
        self.on_loaded: Callable[[AsyncEngine], object] = lambda engine: None
        self.registry = CollectorRegistry()
        self.asked = {name: Histogram(ASKED_BOUNDS) for name in ("n", "max_tokens")}
        self.responses = ResponseStore(config.limits.max_stored_responses)
        self.profiler = Profiler(config.observe.profile_dir)
        endpoint = config.observe.otlp_traces_endpoint
        self.tracing = None if endpoint is None else Tracing.to(endpoint)
        self._tasks: set[asyncio.Task[None]] = set()
        self._engine: AsyncEngine | None = None
        self._vocabulary: Vocabulary | None = None
        self._startup: Startup | None = None
        self._infilling: Infilling | None = None

    def load(self) -> None:
        """Begins to load the model. Called in the event loop, which learns of the end."""
        loop = asyncio.get_running_loop()

        def done(result: AsyncEngine | Exception) -> None:
            if isinstance(result, AsyncEngine):
                self.on_loaded(result)
            loop.call_soon_threadsafe(self.loaded, result)

        self._startup = Startup(self.engine_config, self.config.limits, done)
        self._startup.begin()

    async def wait_loaded(self) -> None:
        """Waits until the model is loaded.

        Raises:
            Exception: what kept it from being loaded.
        """
        while self._engine is None and self.failure is None:
            await asyncio.sleep(POLL_SECONDS)
        if self.failure is not None:
            raise self.failure

    def loaded(self, result: AsyncEngine | Exception) -> None:
        """Takes the engine, or the reason why there is none."""
        if isinstance(result, Exception):
            self.failure = result
            told = isinstance(result, ValueError | OSError | NotImplementedError | CheckpointError)
            logger.error("the model cannot be loaded: %s", result, exc_info=None if told else result)
            self.on_failure()
            return
        if result.hosts is not None:
            loop = asyncio.get_running_loop()
            result.hosts.when_lost(lambda: loop.call_soon_threadsafe(self._host_lost))
        self._vocabulary = result.vocabulary
        self._engine = result
        logger.info("ready: %s", ", ".join(self.names))

    def _host_lost(self) -> None:
        """Nothing can run any more: everybody is told so by the engine, and then the server ends."""
        self.host_lost = True
        self.keep(asyncio.get_running_loop().create_task(self._end_soon()))

    async def _end_soon(self) -> None:
        end = time.monotonic() + FAREWELL_SECONDS
        while self.requests and time.monotonic() < end:
            await asyncio.sleep(POLL_SECONDS)
        self.on_failure()

    @property
    def is_loading(self) -> bool:
        """Whether a thread still loads the model."""
        return self._startup is not None and self._startup.is_running

    @property
    def status(self) -> Status:
        """Whether it can serve, and if not, why."""
        if (
            self.failure is not None
            or self.host_lost
            or (self._engine is not None and self._engine.health == "failed")
        ):
            return "failed"
        if self.draining:
            return "draining"
        if self._engine is None:
            return "loading"
        health = self._engine.health
        return health if health in ("sleeping", "restarting") else "ready"

    def progress(self) -> dict[str, Any]:
        """How far loading is; empty when it is done."""
        return self._startup.progress() if self._startup is not None and self._engine is None else {}

    @property
    def loaded_engine(self) -> AsyncEngine | None:
        """The engine, in whatever state it is; None before it is loaded."""
        return self._engine

    @property
    def engine(self) -> AsyncEngine:
        """The engine, ready to serve.

        Raises:
            ApiError: 503, it is not.
        """
        reasons = {
            "loading": "the model is being loaded; /ready says how far it is",
            "sleeping": "the engine sleeps; an administrator can wake it with /wake_up",
            "restarting": "the engine has failed and starts over; try again",
            "draining": "the server is about to stop",
            "failed": "the engine has failed; the server has to be started again",
        }
        if self.status != "ready":
            raise unavailable(reasons[self.status], retry_after=5)
        return cast(AsyncEngine, self._engine)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """What the tokens say; None without a tokenizer."""
        return self._vocabulary

    @property
    def model_template(self) -> str:
        """The chat template that came with the model; empty if there is none."""
        if self._engine is None or self._vocabulary is None:
            return ""
        return str(self._engine.get_tokenizer().chat_template or "")

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token. Asked for only while there is a tokenizer."""
        return longest_token(self.engine.get_tokenizer())

    def infilling(self) -> Infilling:
        """What makes prompts with a suffix. May be called from any thread.

        Raises:
            ApiError: 400, the model cannot fill in the middle, or there is no tokenizer.
        """
        if self._infilling is None:
            engine = self.engine
            if self._vocabulary is None:
                raise ApiError(400, "suffix: the server was started without a tokenizer", param="suffix")
            self._infilling = Infilling(engine.get_tokenizer())
        return self._infilling

    def decode(self, token_ids: Sequence[int]) -> str:
        """Token ids as text, special tokens included; empty without a tokenizer."""
        if self._engine is None or self._vocabulary is None:
            return ""
        return str(self._engine.get_tokenizer().decode(token_ids, skip_special_tokens=False))

    @staticmethod
    def top_logprobs(asked: int) -> int:
        """How many of a position's tokens to show; -1 stands for all of them."""
        return sys.maxsize if asked == -1 else asked

    def model_name(self, name: str | None) -> str:
        """The name under which a request's model is served; without one, the first.

        Raises:
            ApiError: 404, the model is not served here.
        """
        if name is None:
            return self.names[0]
        if name not in self.names:
            names = " or ".join(map(repr, self.names))
            text = f"model: {name[:200]!r} is not served here; give {names}, or leave it out"
            raise ApiError(404, text, param="model", code="model_not_found")
        return name

    def admit(self, outputs: int) -> Ticket:
        """Counts a request in.

        Args:
            outputs: how many it asks for.

        Raises:
            ApiError: 400 if that is more than one request may, 503 if too many wait.
        """
        limits = self.config.limits
        if outputs > limits.max_outputs:
            text = f"n: {outputs} outputs, prompts times n; at most {limits.max_outputs} in one request"
            raise ApiError(400, text, param="n")
        if self.active + outputs > self.engine.max_num_seqs + limits.max_num_queued_reqs:
            raise unavailable("too many requests are waiting; try again", code="queue_full")
        self.active += outputs
        return Ticket(self, outputs)

    def keep(self, task: asyncio.Task[None]) -> None:
        """Holds on to a task that nobody waits for, until it is done."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Waits for answers in the background, as long as a shutdown may take; then ends what still runs."""
        self.draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.config.limits.shutdown_timeout)
        await self.profiler.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)


def read_template(source: str | None) -> str | None:
    """A chat template, given as a file or as itself.

    Raises:
        ValueError: it is neither.
    """
    if source is None or "{" in source:
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"chat_template={source!r}: neither a template nor a readable file: {error}"
        ) from error


def find_parsers(config: AnswerConfig) -> None:
    """Loads the plugins, and looks whether the parsers that were asked for are there.

    Raises:
        ValueError: a plugin that cannot be loaded, or a parser that is not there.
    """
    if config.tool_parser_plugin is not None:
        load_plugin("tool_parser_plugin", config.tool_parser_plugin)
    if config.reasoning_parser_plugin is not None:
        load_plugin("reasoning_parser_plugin", config.reasoning_parser_plugin)
    if config.tool_call_parser is not None:
        TOOL_PARSERS.get(config.tool_call_parser)
    if config.reasoning_parser is not None:
        REASONING_PARSERS.get(config.reasoning_parser)


async def get_service(request: Request) -> Service:
    """The service of the app that a request came to. If it were not async, a thread would be sent for it."""
    return request.app.state.service


Served = Annotated[Service, Depends(get_service)]
"""An endpoint's parameter for the service."""
