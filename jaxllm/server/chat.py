"""`/v1/chat/completions`: https://platform.openai.com/docs/api-reference/chat"""

import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, NotRequired, Self

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.engine.inputs import Prompt
from jaxllm.engine.outputs import CompletionOutput, RequestOutput
from jaxllm.server import logprobs as forms
from jaxllm.server.errors import ApiError, ErrorResponse
from jaxllm.server.event_stream import DONE, EventStream, event
from jaxllm.server.fields import REFUSED, TOOLS, GenerationRequest, Refusals
from jaxllm.server.generation import Generation, Job, Usage, start, while_connected
from jaxllm.server.logprobs import ChatLogprobs, RankedLogprob, TokenNames
from jaxllm.server.service import Served, Service

router = APIRouter()

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class ChatCompletionRequest(GenerationRequest):
    """A conversation that is to be gone on with, and how."""

    refused: ClassVar[Refusals] = REFUSED | {
        "tools": ((), TOOLS),
        "tool_choice": (("none", "auto"), TOOLS),
        "parallel_tool_calls": ((True,), TOOLS),
        "functions": ((), TOOLS),
        "function_call": (("none", "auto"), TOOLS),
        "include_reasoning": ((True,), "reasoning is a part of the text, and comes with it"),
        "reasoning_effort": (("none",), "set what the model's template reads with chat_template_kwargs"),
        "verbosity": (("medium",), "ask for it in the prompt"),
        "modalities": ((["text"],), "models here write text only"),
        "audio": ((), "models here write text only"),
        "prediction": ((), "every token is sampled by the model itself"),
        "store": ((), "answers are not kept"),
        "metadata": ((), "answers are not kept, and so neither is what describes them"),
        "service_tier": (("auto", "default"), "all requests are served alike; order them with priority"),
        "web_search_options": ((), "there is no search"),
        "moderation": ((), "there is no moderation"),
        "prompt_cache_key": (
            (),
            "prompts that begin alike share a cache; keep them apart with cache_salt",
        ),
        "prompt_cache_options": ((), "prompts that begin the same share a cache by themselves"),
        "prompt_cache_retention": ((), "prompts are kept as long as there is room"),
        "echo": ((), "use continue_final_message, and put the text before the answer yourself"),
    }

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    safety_identifier: str | None = None
    """Shown in the server's log, as `user` is."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens: it is the older name of max_completion_tokens; give one of them")
        for i, message in enumerate(self.messages):
            if message.get("role") not in ROLES:
                raise ValueError(f"messages[{i}].role: must be one of {', '.join(ROLES)}")
        return self


class ChatMessage(TypedDict):
    """The answer of the assistant."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """The answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[list[dict[str, RankedLogprob] | None] | None]
    prompt_token_ids: NotRequired[list[int]]


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={400: {"model": ErrorResponse}})
async def create_chat_completion(body: ChatCompletionRequest, request: Request, service: Served) -> Response:
    """Answers a conversation."""
    model = service.model_name(body.model)
    work = start(service, request, _job(body, service), body.request_id)
    generation = await while_connected(request.receive, work)
    writer = ChatWriter(body, generation, model, service)
    if body.stream:
        return EventStream(generation, writer, service.config.limits.sse_keep_alive)
    async with generation:
        [output] = await while_connected(request.receive, generation.collect())
        request.state.usage = generation.usage()
        return JSONResponse(writer.whole(output))


def _job(body: ChatCompletionRequest, service: Service) -> Job:
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = {"max_tokens": None, **body.sampling()} | ({} if most is None else {"max_tokens": most})
    if body.logprobs:
        params["logprobs"] = body.top_logprobs or 0

    async def render(engine: AsyncEngine) -> Sequence[Prompt]:
        return [await render_chat(engine, body, service)]

    return Job(
        prompts=render,
        num_prompts=1,
        params=params,
        stream=bool(body.stream),
        input_options={
            "priority": body.priority or 0,
            "truncate_prompt_tokens": body.truncate_prompt_tokens,
        },
        known=frozenset(ChatCompletionRequest.model_fields),
        rename={
            "prompt": "messages",
            "prompt_token_ids": "messages",
            "logprobs": "top_logprobs",
            "structured_outputs": body.constraint_name,
        },
        user=body.user or body.safety_identifier,
    )


async def render_chat(engine: AsyncEngine, body: ChatCompletionRequest, service: Service) -> Prompt:
    """The conversation as a prompt.

    Raises:
        ApiError: 400, a template or documents that are not allowed or have no place.
        ValueError, TypeError: as `InputProcessor.render_chat`.
    """
    if body.chat_template is not None and not service.config.access.trust_request_chat_template:
        text = "chat_template: this server uses its own; it may be started with --trust-request-chat-template"
        raise ApiError(400, text, param="chat_template", code="unsupported_parameter")
    if body.add_special_tokens:
        text = "add_special_tokens: a chat's template writes special tokens itself; leave it out"
        raise ApiError(400, text, param="add_special_tokens", code="unsupported_parameter")
    template = body.chat_template or service.chat_template
    variables = dict(body.chat_template_kwargs or {})
    if body.documents is not None:
        if "documents" not in (template or service.model_template):
            text = "documents: the chat template has no place for them; put them into a message"
            raise ApiError(400, text, param="documents", code="unsupported_parameter")
        variables["documents"] = body.documents
    generation_prompt = not body.continue_final_message
    if body.add_generation_prompt is not None:
        generation_prompt = body.add_generation_prompt
    prompt = await engine.render_chat(
        body.messages,
        chat_template=template,
        add_generation_prompt=generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        chat_template_kwargs=variables,
    )
    return prompt if body.cache_salt is None else {**prompt, "cache_salt": body.cache_salt}


class ChatWriter:
    """Turns outputs into answers; an `Encoder` for those that are streamed."""

    def __init__(
        self, body: ChatCompletionRequest, generation: Generation, model: str, service: Service
    ) -> None:
        self._body, self._generation = body, generation
        self._names = TokenNames(service.vocabulary, as_ids=bool(body.return_tokens_as_token_ids))
        self._top = service.top_logprobs(body.top_logprobs or 0)
        self._n = generation.inputs[0].params.n
        self._prompt_sent = False
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{generation.id}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = [
            self._with_tokens(
                sample,
                {
                    "index": sample.index,
                    "message": {"role": "assistant", "content": sample.text, "refusal": None},
                    "logprobs": self._logprobs(sample),
                    "finish_reason": sample.finish_reason,
                    "stop_reason": sample.stop_reason,
                },
            )
            for sample in output.outputs
        ]
        return {**self._head, "choices": choices, "usage": self._generation.usage(), **self._prompt(output)}

    def begin(self) -> Iterable[bytes]:
        """Who speaks, for each answer."""
        for index in range(self._n):
            yield self._chunk(self._delta(index, {"role": "assistant", "content": ""}))

    def encode(self, prompt: int, output: RequestOutput) -> Iterable[bytes]:
        """A chunk for each answer that has something new."""
        for sample in output.outputs:
            logprobs = self._logprobs(sample)
            if not (sample.text or logprobs or sample.finish_reason or self._body.return_token_ids):
                continue
            delta = {"content": sample.text} if sample.text else {}
            choice = self._delta(sample.index, delta, logprobs, sample.finish_reason)
            if sample.finish_reason:
                choice["stop_reason"] = sample.stop_reason
            prompt_fields = {} if self._prompt_sent else self._prompt(output)
            self._prompt_sent = True
            yield self._chunk(self._with_tokens(sample, choice), **prompt_fields)

    def end(self) -> Iterable[bytes]:
        """The usage, if it was asked for."""
        if self._body.include_usage:
            yield event({**self._head, "choices": [], "usage": self._generation.usage()})
        yield DONE

    def error(self, error: ApiError) -> Iterable[bytes]:
        """The error as a chunk."""
        return (event(error.body()), DONE)

    def _chunk(self, choice: dict[str, Any], **more: Any) -> bytes:
        chunk = {**self._head, "choices": [choice], **more}
        if self._body.continuous_usage:
            chunk["usage"] = self._generation.usage()
        elif self._body.include_usage:
            chunk["usage"] = None
        return event(chunk)

    @staticmethod
    def _delta(
        index: int, delta: dict[str, str], logprobs: ChatLogprobs | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, sample: CompletionOutput) -> ChatLogprobs | None:
        if not sample.logprobs:
            return None
        return forms.chat_logprobs(sample.logprobs, self._names, self._top)

    def _with_tokens(self, sample: CompletionOutput, choice: dict[str, Any]) -> dict[str, Any]:
        if self._body.return_token_ids:
            choice["token_ids"] = list(sample.token_ids)
        return choice

    def _prompt(self, output: RequestOutput) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None:
            fields["prompt_logprobs"] = forms.prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = output.prompt_token_ids
        return fields
