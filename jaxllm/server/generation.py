"""One request for text, from its arrival until it is answered or given up."""

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

from fastapi import Request
from starlette.types import Receive
from typing_extensions import TypedDict

from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.engine.core import EngineFailedError, RequestFailedError
from jaxllm.engine.inputs import EngineInput, Prompt
from jaxllm.engine.output_stream import OutputStream
from jaxllm.engine.outputs import PromptLogprobs, RequestOutput, join
from jaxllm.sampling import RequestOutputKind, SamplingParams
from jaxllm.server.errors import TOO_LONG, ApiError, bad_value, unavailable
from jaxllm.server.rate_limits import Account
from jaxllm.server.service import Service, Ticket
from jaxllm.server.tracing import RequestSpan

TIMEOUT_HEADER = "x-request-timeout"
T = TypeVar("T")


class PromptTokensDetails(TypedDict):
    """Where a prompt's tokens came from."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of a request: https://platform.openai.com/docs/api-reference/chat/object"""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ClientGoneError(Exception):
    """Nobody is there any more to be answered."""


@dataclass(frozen=True)
class Job:
    """What is to be generated.

    Attributes:
        prompts: makes the prompts; called once the request has been admitted.
        num_prompts: how many it will make.
        params: what holds for each of them, over the model's own defaults.
        stream: whether outputs are wanted as they grow.
        input_options: `priority`, `add_special_tokens` and the like, see `InputProcessor.make`.
        known: the request's parameters, for errors.
        rename: the engine's names of parameters that the request calls otherwise.
        user: who asks, for the log.
        shape: changes the parameters of a prompt, once it is made.
        fits_output: whether outputs are cut to what the model's length leaves of `max_tokens`; else a request
            for more than that is refused.
    """

    prompts: Callable[[AsyncEngine], Awaitable[Sequence[Prompt]]]
    num_prompts: int
    params: Mapping[str, Any]
    stream: bool
    input_options: Mapping[str, Any]
    known: frozenset[str]
    rename: Mapping[str, str]
    user: str | None = None
    shape: Callable[[Prompt, SamplingParams], SamplingParams] = lambda prompt, params: params
    fits_output: bool = False


class Generation:
    """The outputs of an admitted request. Close it, or use it in `async with`.

    Attributes:
        id: of the request, without the prefix of its kind.
        inputs: one for each prompt.
        deadline: when the time limit is over, on the event loop's clock.
        on_close: called when it is closed, whether it was answered to the end or not.
    """

    def __init__(
        self,
        request_id: str,
        inputs: Sequence[EngineInput],
        stream: OutputStream,
        ticket: Ticket,
        deadline: float,
        service: Service,
        job: Job,
        account: Account | None = None,
        span: RequestSpan | None = None,
    ) -> None:
        self.id = request_id
        self._account, self._span = account, span
        self.inputs = inputs
        self._numbers = {name: number for number, name in enumerate(stream.request_ids)}
        self._stream, self._ticket, self.deadline, self._service = stream, ticket, deadline, service
        self._job = job
        self._cached = [0] * len(inputs)
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}
        self._unscored: dict[int, RequestOutput] = {}
        self._generated = 0
        self._closed = self._cancelled = False
        self.on_close: Callable[[], None] = lambda: None
        service.requests += 1

    @property
    def finished(self) -> bool:
        """Whether everything has been taken."""
        return self._stream.finished

    async def take(self, patience: float | None = None) -> list[tuple[int, RequestOutput]]:
        """What is new, with the number of the prompt that it belongs to.

        A prompt's logprobs, if they were asked for, are in each of its outputs.

        Args:
            patience: seconds after which it gives an empty list.

        Raises:
            ApiError: 408 after the deadline, 503 if the engine stopped, 400 if what the output is held to
                turned out to be too complex.
            RequestFailedError, EngineFailedError: as for `OutputStream.take`.
        """
        try:
            return await self._take(patience)
        except Exception as error:
            if self._span is not None:
                self._span.fail(error)
            raise

    async def _take(self, patience: float | None) -> list[tuple[int, RequestOutput]]:
        now = asyncio.get_running_loop().time()
        limit = self.deadline if patience is None else min(self.deadline, now + patience)
        try:
            async with asyncio.timeout_at(limit):
                outputs = await self._stream.take()
        except TimeoutError:
            if asyncio.get_running_loop().time() >= self.deadline:
                raise ApiError(408, "the request took longer than its time limit", code="timeout") from None
            return []
        except ValueError as error:
            raise bad_value(error, self._job.known, self._job.rename) from error
        counted = [(self._numbers[output.request_id], self._count(output)) for output in outputs]
        return [
            (number, scored) for number, new in counted if (scored := self._scored(number, new)) is not None
        ]

    def _scored(self, number: int, output: RequestOutput) -> RequestOutput | None:
        """An output with its prompt's logprobs, which the engine gives once; None, and kept, before it does.

        They may come with a sample that has no text yet, and samples that begin later need them, too.
        """
        if self.inputs[number].num_prompt_logprobs is None:
            return output
        if number in self._unscored:
            output = join(self._unscored.pop(number), output)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[number] = output.prompt_logprobs
        elif number not in self._prompt_logprobs and not output.finished:
            self._unscored[number] = output
            return None
        return replace(output, prompt_logprobs=self._prompt_logprobs.get(number))

    def _count(self, output: RequestOutput) -> RequestOutput:
        if any(sample.finish_reason == "abort" for sample in output.outputs):
            if self._cancelled:
                raise ApiError(400, "the request was cancelled", code="cancelled")
            raise unavailable("the engine stopped before the request was done")
        self._cached[self._numbers[output.request_id]] = output.num_cached_tokens or 0
        generated = sum(len(sample.token_ids) for sample in output.outputs)
        self._generated += generated
        if self._span is not None:
            self._span.see(output)
        if self._account is not None:
            self._account.write(generated)
        return output

    async def collect(self) -> list[RequestOutput]:
        """The whole outputs, in the order of the prompts; for requests that do not stream."""
        found: dict[int, RequestOutput] = {}
        while not self.finished:
            found |= dict(await self.take())
        return [found[number] for number in range(len(self.inputs))]

    def usage(self) -> Usage:
        """Tokens so far."""
        prompt = sum(len(input.prompt_token_ids) for input in self.inputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }

    def cancel(self) -> None:
        """Ends what still runs, on somebody else's word: whoever takes its outputs is told."""
        self._cancelled = True
        self._stream.close()

    def close(self) -> None:
        """Ends what still runs and makes room for others. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self._service.requests -= 1
            self._stream.close()
            self._ticket.give_back()
            if self._span is not None:
                self._span.end(sum(len(input.prompt_token_ids) for input in self.inputs), self._generated)
            self.on_close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._span is not None:
            self._span.fail(error)
        self.close()


async def start(service: Service, request: Request, job: Job, request_id: str | None) -> Generation:
    """Admits a request, checks all of it, and hands it to the engine.

    Raises:
        ApiError: 400 for what cannot be served, 503 if too many wait or the engine cannot serve.
    """
    engine, arrived = service.engine, time.time_ns()
    deadline = asyncio.get_running_loop().time() + time_limit(request, service.config.limits.request_timeout)
    kind = RequestOutputKind.DELTA if job.stream else RequestOutputKind.FINAL_ONLY
    try:
        params = replace(engine.default_params, **{**job.params, "output_kind": kind})
    except (TypeError, ValueError) as error:
        raise bad_value(error, job.known, job.rename) from error
    request.state.user = job.user
    ticket = service.admit(params.n * job.num_prompts)
    service.asked["n"].observe(params.n)
    if params.max_tokens is not None:
        service.asked["max_tokens"].observe(params.max_tokens)
    try:
        inputs = await _make_inputs(service, engine, job, params)
        if service.config.access.cache_salt_per_key:
            key = request.state.key_hash
            inputs = [replace(input, cache_salt=f"{key}/{input.cache_salt or ''}") for input in inputs]
        account: Account | None = getattr(request.state, "account", None)
        if account is not None:
            account.read(sum(len(input.prompt_token_ids) for input in inputs))
        request_id = request_id or uuid.uuid4().hex
        many = len(inputs) > 1
        named = {f"{request_id}-{i}" if many else request_id: input for i, input in enumerate(inputs)}
        stream = await _submit(service, engine, named, job)
        span = None
        if service.tracing is not None:
            span = service.tracing.begin(request, service.names[0], request_id, params, arrived)
        return Generation(request_id, inputs, stream, ticket, deadline, service, job, account, span)
    except BaseException:
        ticket.give_back()
        raise


def _check_size(service: Service, params: SamplingParams, job: Job) -> None:
    structured, most = params.structured_outputs, service.config.limits.max_grammar_size
    if structured is not None and structured.size > most:
        name = f"structured_outputs.{structured.constraint}"
        error = ValueError(f"{name}: {structured.size} bytes; this server takes at most {most}")
        raise bad_value(error, job.known, job.rename)


def _check_room(engine: AsyncEngine, input: EngineInput, job: Job) -> None:
    """Refuses outputs that cannot be as long as was asked, in OpenAI's words, which clients look for."""
    prompt, asked, most = len(input.prompt_token_ids), job.params.get("max_tokens"), engine.max_model_len
    if job.fits_output or asked is None or prompt + asked <= most:
        return
    place = job.rename.get("prompt", "prompt")
    raise ValueError(
        f"max_tokens: This model's {TOO_LONG} {most} tokens. However, you requested {prompt + asked} tokens "
        f"({prompt} in the {place}, {asked} in the completion). Please reduce the length of the {place} or "
        "completion."
    )


async def _make_inputs(
    service: Service, engine: AsyncEngine, job: Job, params: SamplingParams
) -> list[EngineInput]:
    try:
        prompts = await job.prompts(engine)
    except (TypeError, ValueError) as error:
        raise bad_value(error, job.known, job.rename) from error
    inputs = []
    for i, prompt in enumerate(prompts):
        try:
            shaped = job.shape(prompt, params)
            _check_size(service, shaped, job)
            inputs.append(await engine.make_input(prompt, shaped, **job.input_options))
            _check_room(engine, inputs[-1], job)
        except (TypeError, ValueError) as error:
            found = bad_value(error, job.known, job.rename)
            if len(prompts) > 1:
                found.message = f"prompt {i}: {found.message}"
            raise found from error
    return inputs


async def _submit(
    service: Service, engine: AsyncEngine, inputs: Mapping[str, EngineInput], job: Job
) -> OutputStream:
    try:
        return await engine.submit(inputs)
    except ValueError as error:
        raise bad_value(error, job.known, job.rename) from error
    except (EngineFailedError, RequestFailedError):
        raise
    except RuntimeError:
        _ = service.engine  # says what is the matter, if it stopped or fell asleep meanwhile
        raise


def time_limit(request: Request, most: float) -> float:
    """Seconds that a request may take: the server's limit, or less if the client says so.

    Raises:
        ApiError: 400, the header is not a number above 0.
    """
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return most
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ApiError(400, f"{TIMEOUT_HEADER}: must be a number of seconds above 0", param=TIMEOUT_HEADER)
    return min(seconds, most)


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Waits for work, unless the client leaves before it is done.

    Raises:
        ClientGoneError: it left; the work has been cancelled.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for running in (task, watch):
            running.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
