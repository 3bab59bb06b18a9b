"""`/v1/completions`: https://platform.openai.com/docs/api-reference/completions"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NotRequired, Self

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.engine.inputs import Prompt
from jaxllm.engine.outputs import CompletionOutput, RequestOutput
from jaxllm.server import logprobs as forms
from jaxllm.server.chunk_writer import ChunkWriter
from jaxllm.server.errors import ApiError, ErrorResponse
from jaxllm.server.event_stream import EventStream
from jaxllm.server.fields import GenerationRequest, Tokens
from jaxllm.server.generation import Generation, Job, Usage, start, while_connected
from jaxllm.server.infilling import Infilling
from jaxllm.server.logprobs import CompletionLogprobs, RankedLogprob, TokenNames
from jaxllm.server.service import Served, Service

router = APIRouter()

Prompts = str | Tokens | list[str] | list[Tokens]


class CompletionRequest(GenerationRequest):
    """What is to be completed, and how."""

    prompt: Annotated[Prompts | list[str | Tokens], Field(union_mode="left_to_right")]
    """Text, token ids, or a list of both."""
    suffix: str | None = None
    """Text after what is to be written, for models that can fill in the middle."""
    echo: bool | None = None
    logprobs: int | None = None

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.suffix:
            if self.echo or self.truncate_prompt_tokens is not None:
                raise ValueError("suffix: not together with echo or truncate_prompt_tokens; leave them out")
            parts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
            if not all(isinstance(part, str) for part in parts):
                raise ValueError("suffix: needs a prompt that is text, not token ids")
        return self

    def prompts(self) -> list[Prompt]:
        """The prompts, each with the salt."""
        alone = isinstance(self.prompt, str) or (
            bool(self.prompt) and all(isinstance(item, int) for item in self.prompt)
        )
        parts: Sequence[Any] = [self.prompt] if alone else self.prompt
        return [self._prompt(part) for part in parts]

    def _prompt(self, part: Any) -> Any:
        prompt = {"prompt": part} if isinstance(part, str) else {"prompt_token_ids": part}
        return prompt if self.cache_salt is None else {**prompt, "cache_salt": self.cache_salt}


class CompletionChoice(TypedDict):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None
    prompt_logprobs: NotRequired[list[dict[str, RankedLogprob] | None] | None]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class Completion(TypedDict):
    """The answer, or a part of it where it is streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


@router.post("/v1/completions", response_model=Completion, responses={400: {"model": ErrorResponse}})
async def create_completion(body: CompletionRequest, request: Request, service: Served) -> Response:
    """Completes prompts."""
    model = service.model_name(body.model)
    infilling = await asyncio.to_thread(service.infilling) if body.suffix else None
    work = start(service, request, _job(body, infilling), body.request_id)
    generation = await while_connected(request.receive, work)
    writer = CompletionWriter(body, generation, model, service)
    if body.stream:
        return EventStream(generation, writer, service.config.limits.sse_keep_alive)
    async with generation:
        outputs = await while_connected(request.receive, generation.collect())
        request.state.usage = generation.usage()
        return JSONResponse(writer.whole(outputs))


def _job(body: CompletionRequest, infilling: Infilling | None) -> Job:
    params = body.sampling()
    if body.logprobs is not None:
        params["logprobs"] = body.logprobs
        if body.echo:
            params.setdefault("prompt_logprobs", body.logprobs)
    if body.max_tokens == 0 and body.echo:
        params["max_tokens"] = 1  # the prompt is scored on the way to a token, which is then left out
    prompts = body.prompts()
    if not prompts:
        raise ApiError(400, "prompt: there are none; give at least one", param="prompt")
    special = body.add_special_tokens is not False
    if infilling is not None:
        params["stop_token_ids"] = [*params.get("stop_token_ids", ()), *infilling.stop_token_ids]

    async def give(engine: AsyncEngine) -> Sequence[Prompt]:
        if infilling is None:
            return prompts
        return await asyncio.to_thread(infilling.prompts, prompts, body.suffix or "", special=special)

    return Job(
        prompts=give,
        num_prompts=len(prompts),
        params=params,
        stream=bool(body.stream),
        input_options={
            "priority": body.priority or 0,
            "add_special_tokens": special,
            "truncate_prompt_tokens": body.truncate_prompt_tokens,
        },
        known=frozenset(CompletionRequest.model_fields),
        rename={"prompt_token_ids": "prompt", "structured_outputs": body.constraint_name},
        user=body.user,
    )


class CompletionWriter(ChunkWriter):
    """Turns outputs into answers; an `Encoder` for those that are streamed."""

    def __init__(self, body: CompletionRequest, generation: Generation, model: str, service: Service) -> None:
        super().__init__(body, generation, id=f"cmpl-{generation.id}", kind="text_completion", model=model)
        self._body, self._service = body, service
        self._names = TokenNames(service.vocabulary, as_ids=bool(body.return_tokens_as_token_ids))
        self._n = generation.inputs[0].params.n
        self._silent = body.max_tokens == 0
        self._echoed: set[int] = set()
        self._offsets: dict[int, int] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = [
            self._choice(number, output, sample)
            for number, output in enumerate(outputs)
            for sample in output.outputs
        ]
        return {**self._head, "choices": choices, "usage": self._generation.usage()}

    def begin(self) -> Iterable[bytes]:
        """Nothing: the first text comes with the first output."""
        return ()

    def encode(self, prompt: int, output: RequestOutput) -> Iterable[bytes]:
        """A chunk for each sample that has something new."""
        for sample in output.outputs:
            choice = self._choice(prompt, output, sample)
            asked = "token_ids" in choice or "prompt_logprobs" in choice
            if choice["text"] or choice["logprobs"] or choice["finish_reason"] or asked:
                yield self._chunk(choice)

    def _choice(self, number: int, output: RequestOutput, sample: CompletionOutput) -> CompletionChoice:
        index = number * self._n + sample.index
        text, token_ids = ("", []) if self._silent else (sample.text, list(sample.token_ids))
        positions: list[Any] = [] if self._silent else list(sample.logprobs or [])
        first = index not in self._echoed
        self._echoed.add(index)
        offset = self._offsets.get(index, 0)
        shown = token_ids
        if first and self._body.echo:
            text = self._prompt_text(number) + text
            shown = output.prompt_token_ids + token_ids
            positions = list(output.prompt_logprobs or []) + positions
        choice: CompletionChoice = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": sample.finish_reason,  # pyright: ignore[reportAssignmentType] - others are errors
            "stop_reason": sample.stop_reason,
        }
        if self._body.logprobs is not None and shown:
            top = self._service.top_logprobs(self._body.logprobs)
            choice["logprobs"] = forms.completion_logprobs(shown, positions, self._names, top, offset)
            self._offsets[index] = offset + sum(map(len, choice["logprobs"]["tokens"]))
        if self._body.prompt_logprobs is not None and first:
            choice["prompt_logprobs"] = forms.prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            choice["token_ids"] = token_ids
            if first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _prompt_text(self, number: int) -> str:
        input = self._generation.inputs[number]
        if input.prompt is not None:
            return input.prompt
        return self._service.decode(input.prompt_token_ids)
