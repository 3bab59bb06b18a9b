"""`/v1/responses`: https://platform.openai.com/docs/api-reference/responses"""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.engine.inputs import Prompt
from jaxllm.server.answer_form import AnswerForm, answer_form
from jaxllm.server.errors import ApiError, ErrorResponse, of_exception
from jaxllm.server.event_stream import EventStream
from jaxllm.server.fields import format_constraint, structured_outputs
from jaxllm.server.generation import Generation, Job, start, while_connected
from jaxllm.server.logprobs import TokenNames
from jaxllm.server.response_fields import ResponsesRequest
from jaxllm.server.response_store import StoredResponse
from jaxllm.server.response_types import DeletedResponse, ResponseObject
from jaxllm.server.response_writer import ResponseWriter, new_response
from jaxllm.server.service import Served, Service
from jaxllm.server.tools import check_results

router = APIRouter()


@router.post("/v1/responses", response_model=ResponseObject, responses={400: {"model": ErrorResponse}})
async def create_response(body: ResponsesRequest, request: Request, service: Served) -> Response:
    """Answers a text or a conversation, which may go on from an answer before."""
    model = service.model_name(body.model)
    earlier: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        before = service.responses.get(body.previous_response_id, "previous_response_id")
        if before.body["status"] not in ("completed", "incomplete"):
            text = f"previous_response_id: that answer is {before.body['status']}"
            raise ApiError(400, text, param="previous_response_id")
        earlier = before.messages
    messages = [*earlier, *body.messages()]
    form = _form(body, service)
    work = start(service, request, _job(body, form, messages, service), None)
    generation = await while_connected(request.receive, work)
    params = generation.inputs[0].params
    stored = StoredResponse(new_response(body, generation, model, params), messages)
    store = None if body.store is False else service.responses
    writer = ResponseWriter(body, form, generation, TokenNames(service.vocabulary), stored, store)
    if body.background:
        service.keep(asyncio.create_task(_finish(generation, writer)))
        return JSONResponse(writer.response)
    if body.stream:
        return EventStream(generation, writer, service.config.limits.sse_keep_alive)
    async with generation:
        [output] = await while_connected(request.receive, generation.collect())
        request.state.usage = generation.usage()
        writer.add(output.outputs[0])
        return JSONResponse(writer.finish())


@router.get("/v1/responses/{response_id}", response_model=ResponseObject)
async def get_response(response_id: str, service: Served) -> Response:
    """An answer that is stored."""
    return JSONResponse(service.responses.get(response_id).body)


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, service: Served) -> DeletedResponse:
    """Forgets an answer."""
    service.responses.delete(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel", response_model=ResponseObject)
async def cancel_response(response_id: str, service: Served) -> Response:
    """Ends an answer that is on its way; one that is done stays as it is."""
    found = service.responses.get(response_id)
    if found.cancel is not None:
        found.cancel()
    return JSONResponse(found.body)


async def _finish(generation: Generation, writer: ResponseWriter) -> None:
    """Makes an answer in the background."""
    async with generation:
        try:
            [output] = await generation.collect()
            writer.add(output.outputs[0])
            writer.finish()
        except Exception as error:
            if writer.response["status"] != "cancelled":
                writer.fail(of_exception(error, generation.id))


def _form(body: ResponsesRequest, service: Service) -> AnswerForm:
    form = answer_form(body.tool_use, service)
    if body.wants_logprobs and (form.tool_parser or form.reasoning_parser):
        text = "include: logprobs are those of text alone; leave them out where there are tools or reasoning"
        raise ApiError(400, text, param="include", code="unsupported_parameter")
    return form


def _job(body: ResponsesRequest, form: AnswerForm, messages: list[dict[str, Any]], service: Service) -> Job:
    rendered = messages
    if body.instructions is not None:
        rendered = [{"role": "system", "content": body.instructions}, *messages]

    async def render(engine: AsyncEngine) -> Sequence[Prompt]:
        check_results(rendered)
        tools = form.shown_tools(service)
        return [await engine.render_chat(rendered, chat_template=service.chat_template, tools=tools)]

    params: dict[str, Any] = {"max_tokens": body.max_output_tokens}
    if body.wants_logprobs:
        params["logprobs"] = body.top_logprobs or 0
    constraint = format_constraint(body.format["type"], body.format.get("schema"))
    if constraint is not None:
        params["structured_outputs"] = structured_outputs("text", constraint)
    given = {"temperature": body.temperature, "top_p": body.top_p}
    return Job(
        prompts=render,
        num_prompts=1,
        params=params | {name: value for name, value in given.items() if value is not None},
        stream=bool(body.stream),
        input_options={},
        known=frozenset(ResponsesRequest.model_fields),
        rename={
            "prompt": "input",
            "prompt_token_ids": "input",
            "messages": "input",
            "max_tokens": "max_output_tokens",
            "logprobs": "top_logprobs",
            "structured_outputs": "text",
        }
        | form.rename(params),
        user=body.user or body.safety_identifier,
        shape=form.shape,
    )
