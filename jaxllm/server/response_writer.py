"""The answers of `/v1/responses`, whole or as events.

https://platform.openai.com/docs/api-reference/responses/object and .../responses-streaming
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any, cast

from jaxllm.engine.outputs import CompletionOutput, RequestOutput
from jaxllm.sampling import SamplingParams
from jaxllm.server.answer_blocks import BlockEvent, BlockRow
from jaxllm.server.answer_form import AnswerForm
from jaxllm.server.answer_parts import Part, Text
from jaxllm.server.errors import ApiError
from jaxllm.server.event_stream import event
from jaxllm.server.generation import Generation
from jaxllm.server.logprobs import TokenLogprob, TokenNames, chat_logprobs
from jaxllm.server.reasoning_parsers import count_reasoning
from jaxllm.server.response_fields import ResponsesRequest, ResponseTool
from jaxllm.server.response_items import ItemEvents
from jaxllm.server.response_store import ResponseStore, StoredResponse
from jaxllm.server.response_types import ItemStatus, ResponseObject, ResponseStatus, ResponseUsage, ShownTool


class ResponseWriter:
    """Writes one answer, and keeps it; an `Encoder` for one that is streamed.

    Args:
        form: how the answer is read.
        names: of tokens, for logprobs.
        stored: what is kept of it.
        store: where it is kept; None: nowhere.
    """

    def __init__(
        self,
        body: ResponsesRequest,
        form: AnswerForm,
        generation: Generation,
        names: TokenNames,
        stored: StoredResponse,
        store: ResponseStore | None,
    ) -> None:
        self._body, self._generation, self._names, self._stored = body, generation, names, stored
        self._reader = form.reader(generation.inputs[0].prompt)
        self._row = BlockRow()
        self._items = ItemEvents(generation.id)
        self._token_ids: list[int] = []
        self._reason: str | None = None
        self._sequence = 0
        stored.cancel = self.cancel
        generation.on_close = self.abandon
        if store is not None:
            store.put(stored)

    @property
    def response(self) -> ResponseObject:
        """The answer as far as it is known."""
        return self._stored.body

    def add(self, sample: CompletionOutput) -> list[dict[str, Any]]:
        """Takes what is new, and gives the events of it."""
        parts = self._reader.read(sample.text, finished=sample.finish_reason is not None)
        logprobs: list[TokenLogprob] = []
        if sample.logprobs and self._body.wants_logprobs:
            logprobs = chat_logprobs(sample.logprobs, self._names, self._body.top_logprobs or 0)["content"]
            parts = parts or [Text("")]
        self._reason = sample.finish_reason
        self._token_ids += sample.token_ids
        return [event for found in self._blocks(parts) for event in self._items.of(found, logprobs)]

    def _blocks(self, parts: Iterable[Part]) -> Iterator[BlockEvent]:
        for part in parts:
            yield from self._row.add(part)
        if self._reason is not None:
            yield from self._row.finish("incomplete" if self._incomplete else "completed")

    @property
    def _incomplete(self) -> bool:
        return self._reason == "length"

    def finish(self) -> ResponseObject:
        """The answer, done."""
        status: ItemStatus = "incomplete" if self._incomplete else "completed"
        details = {"reason": "max_output_tokens"} if self._incomplete else None
        output = [self._items.item(block) for block in self._row.blocks]
        self._set(status, incomplete_details=details, output=output, usage=self._usage())
        self._stored.messages.append(self._row.message())
        return self.response

    def fail(self, error: ApiError) -> ResponseObject:
        """The answer, failed."""
        self._set("failed", error={"code": error.code or "server_error", "message": error.message})
        return self.response

    def cancel(self) -> None:
        """Ends the answer where it is."""
        self._generation.cancel()
        self._set("cancelled")

    def abandon(self) -> None:
        """Nobody waits for the rest: an answer that is not done stays without an end."""
        if self.response["status"] == "in_progress":
            self._set("cancelled")

    def begin(self) -> Iterable[bytes]:
        """The empty answer."""
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def encode(self, prompt: int, output: RequestOutput) -> Iterable[bytes]:
        """What is new of its items."""
        for sample in output.outputs:
            for found in self.add(sample):
                yield self._event(**found)

    def end(self) -> Iterable[bytes]:
        """The whole answer."""
        response = self.finish()
        yield self._event(f"response.{response['status']}", response=response)

    def error(self, error: ApiError) -> Iterable[bytes]:
        """The failed answer; one that was cancelled says so."""
        if self.response["status"] != "cancelled":
            self.fail(error)
        return (self._event("response.failed", response=self.response),)

    def _set(self, status: ResponseStatus, **fields: Any) -> None:
        self._stored.body = cast(ResponseObject, {**self._stored.body, "status": status, **fields})
        self._stored.cancel = None

    def _event(self, type: str, **fields: Any) -> bytes:
        data = {"type": type, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event(data, type)

    def _reasoning_tokens(self) -> int:
        parser = self._reader.reasoning
        written = (self._names.data(token) or b"" for token in self._token_ids)
        return 0 if parser is None else count_reasoning(parser, written)

    def _usage(self) -> ResponseUsage:
        usage = self._generation.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens()},
            "total_tokens": usage["total_tokens"],
        }


def new_response(
    body: ResponsesRequest, generation: Generation, model: str, params: SamplingParams
) -> ResponseObject:
    """An answer that has just begun.

    Args:
        params: what the request is served with.
    """
    return {
        "id": f"resp_{generation.id}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.tool_use.parallel,
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": {"format": body.format},
        "tool_choice": body.tool_choice or "auto",
        "tools": [_shown(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _shown(tool: ResponseTool) -> ShownTool:
    return {
        "type": tool.type,
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
