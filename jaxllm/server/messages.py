"""`/v1/messages`: Anthropic's interface, https://docs.anthropic.com/en/api/messages"""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response
from typing_extensions import TypedDict

from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.engine.inputs import Prompt
from jaxllm.server.answer_form import AnswerForm, answer_form
from jaxllm.server.errors import bad_value
from jaxllm.server.event_stream import EventStream
from jaxllm.server.fields import structured_outputs
from jaxllm.server.generation import Job, start, while_connected
from jaxllm.server.message_fields import CountTokensRequest, MessagesRequest
from jaxllm.server.message_writer import Message, MessageWriter
from jaxllm.server.service import Served, Service
from jaxllm.server.tools import check_results

router = APIRouter()


class TokenCount(TypedDict):
    """Tokens of a prompt."""

    input_tokens: int


@router.post("/v1/messages", response_model=Message)
async def create_message(body: MessagesRequest, request: Request, service: Served) -> Response:
    """Answers a conversation."""
    model = service.model_name(body.model)
    form = _form(body, service)
    work = start(service, request, _job(body, form, service), None)
    generation = await while_connected(request.receive, work)
    writer = MessageWriter(form, generation, model)
    if body.stream:
        return EventStream(generation, writer, service.config.limits.sse_keep_alive)
    async with generation:
        [output] = await while_connected(request.receive, generation.collect())
        request.state.usage = generation.usage()
        return JSONResponse(writer.whole(output.outputs[0]))


@router.post("/v1/messages/count_tokens", response_model=TokenCount)
async def count_tokens(body: CountTokensRequest, service: Served) -> TokenCount:
    """Tokens of a conversation's prompt."""
    service.model_name(body.model)
    form = _form(body, service)
    try:
        prompt: Any = await _render(service.engine, body, form, service)
    except (TypeError, ValueError) as error:
        raise bad_value(error, CountTokensRequest.model_fields, {}) from error
    return {"input_tokens": len(prompt["prompt_token_ids"])}


def _form(body: CountTokensRequest, service: Service) -> AnswerForm:
    return answer_form(
        body.tool_use,
        service,
        include_reasoning=body.thinking is None or body.thinking.type != "disabled",
        continued=body.turns()[-1]["content"] if body.continues else "",
    )


async def _render(
    engine: AsyncEngine, body: CountTokensRequest, form: AnswerForm, service: Service
) -> Prompt:
    """The conversation as a prompt; an assistant's message at the end is gone on with."""
    turns = body.turns()
    check_results(turns)
    return await engine.render_chat(
        turns,
        chat_template=service.chat_template,
        add_generation_prompt=not body.continues,
        continue_final_message=body.continues,
        tools=form.shown_tools(service),
    )


def _job(body: MessagesRequest, form: AnswerForm, service: Service) -> Job:
    async def render(engine: AsyncEngine) -> Sequence[Prompt]:
        return [await _render(engine, body, form, service)]

    params: dict[str, Any] = {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
    }
    name, wanted = body.format
    if wanted is not None:
        params["structured_outputs"] = structured_outputs(name, {"json": wanted.schema_})
    return Job(
        prompts=render,
        num_prompts=1,
        params={name: value for name, value in params.items() if value is not None},
        stream=bool(body.stream),
        input_options={},
        known=frozenset(MessagesRequest.model_fields),
        rename={
            "prompt": "messages",
            "prompt_token_ids": "messages",
            "stop": "stop_sequences",
            "structured_outputs": name,
        }
        | form.rename(params),
        user=body.metadata.user_id if body.metadata else None,
        shape=form.shape,
        fits_output=True,  # clients have to give max_tokens, and take the model's length for Claude's
    )
