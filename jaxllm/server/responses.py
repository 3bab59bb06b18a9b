"""`/v1/responses`: https://platform.openai.com/docs/api-reference/responses"""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.engine.inputs import Prompt
from jaxllm.server.errors import ApiError, ErrorResponse, of_exception
from jaxllm.server.event_stream import EventStream
from jaxllm.server.fields import format_constraint, structured_outputs
from jaxllm.server.generation import Generation, Job, start, while_connected
from jaxllm.server.logprobs import TokenNames
from jaxllm.server.response_fields import ResponsesRequest
from jaxllm.server.response_store import StoredResponse
from jaxllm.server.response_writer import ResponseWriter, new_response
from jaxllm.server.service import Served, Service

router = APIRouter()


@router.post("/v1/responses", responses={400: {"model": ErrorResponse}})
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
    work = start(service, request, _job(body, messages, service), None)
    generation = await while_connected(request.receive, work)
    params = generation.inputs[0].params
    shown = {"temperature": params.temperature, "top_p": params.top_p}
    stored = StoredResponse(new_response(body, generation, model, shown), messages)
    store = None if body.store is False else service.responses
    writer = ResponseWriter(body, generation, TokenNames(service.vocabulary), stored, store)
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


@router.get("/v1/responses/{response_id}")
async def get_response(response_id: str, service: Served) -> Response:
    """An answer that is stored."""
    return JSONResponse(service.responses.get(response_id).body)


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, service: Served) -> Response:
    """Forgets an answer."""
    service.responses.delete(response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel")
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


def _job(body: ResponsesRequest, messages: list[dict[str, Any]], service: Service) -> Job:
    rendered = messages
    if body.instructions is not None:
        rendered = [{"role": "system", "content": body.instructions}, *messages]

    async def render(engine: AsyncEngine) -> Sequence[Prompt]:
        return [await engine.render_chat(rendered, chat_template=service.chat_template)]

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
        },
        user=body.user or body.safety_identifier,
    )
