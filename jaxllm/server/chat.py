"""`/v1/chat/completions`: https://platform.openai.com/docs/api-reference/chat"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.engine.inputs import Prompt
from jaxllm.server.answer_form import AnswerForm, answer_form
from jaxllm.server.chat_fields import ChatCompletionRequest
from jaxllm.server.chat_writer import ChatCompletion, ChatWriter
from jaxllm.server.errors import ApiError, ErrorResponse
from jaxllm.server.event_stream import EventStream
from jaxllm.server.generation import Job, start, while_connected
from jaxllm.server.service import Served, Service
from jaxllm.server.tools import check_results

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={400: {"model": ErrorResponse}})
async def create_chat_completion(body: ChatCompletionRequest, request: Request, service: Served) -> Response:
    """Answers a conversation."""
    model = service.model_name(body.model)
    form = _form(body, service)
    work = start(service, request, _job(body, form, service), body.request_id)
    generation = await while_connected(request.receive, work)
    writer = ChatWriter(body, form, generation, model, service)
    if body.stream:
        return EventStream(generation, writer, service.config.limits.sse_keep_alive)
    async with generation:
        [output] = await while_connected(request.receive, generation.collect())
        request.state.usage = generation.usage()
        return JSONResponse(writer.whole(output))


def _form(body: ChatCompletionRequest, service: Service) -> AnswerForm:
    config = service.config.answer
    if body.include_reasoning is False and config.reasoning_parser is None:
        text = "include_reasoning: reasoning is a part of the text on a server without --reasoning-parser"
        raise ApiError(400, text, param="include_reasoning", code="unsupported_parameter")
    last = body.messages[-1].get("content") if body.messages and body.continue_final_message else None
    form = answer_form(
        body.tool_use,
        service,
        include_reasoning=body.include_reasoning is not False,
        continued=last if isinstance(last, str) else "",
    )
    if body.skip_special_tokens and form.tool_parser and form.tool_parser.needs_special_tokens:
        text = "skip_special_tokens: calls of tools are read from special tokens; leave it out"
        raise ApiError(400, text, param="skip_special_tokens")
    return form


def _job(body: ChatCompletionRequest, form: AnswerForm, service: Service) -> Job:
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = {"max_tokens": None, **body.sampling()} | ({} if most is None else {"max_tokens": most})
    if body.logprobs:
        params["logprobs"] = body.top_logprobs or 0

    async def render(engine: AsyncEngine) -> Sequence[Prompt]:
        return [await render_chat(engine, body, service, form.shown_tools(service))]

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
            "max_tokens": "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
            "structured_outputs": body.constraint_name,
        }
        | form.rename(params),
        user=body.user or body.safety_identifier,
        shape=form.shape,
    )


async def render_chat(
    engine: AsyncEngine,
    body: ChatCompletionRequest,
    service: Service,
    tools: Sequence[Mapping[str, Any]] | None,
) -> Prompt:
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
    check_results(body.messages)
    prompt = await engine.render_chat(
        body.messages,
        chat_template=template,
        add_generation_prompt=generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        tools=tools,
        chat_template_kwargs=variables,
    )
    return prompt if body.cache_salt is None else {**prompt, "cache_salt": body.cache_salt}
