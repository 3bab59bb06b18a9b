"""The answers of `/v1/responses`, whole or as events.

https://platform.openai.com/docs/api-reference/responses/object and .../responses-streaming
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from jaxllm.engine.outputs import CompletionOutput, RequestOutput
from jaxllm.server.errors import ApiError
from jaxllm.server.event_stream import event
from jaxllm.server.generation import Generation
from jaxllm.server.logprobs import TokenLogprob, TokenNames, chat_logprobs
from jaxllm.server.response_fields import ResponsesRequest
from jaxllm.server.response_store import ResponseStore, StoredResponse


class ResponseWriter:
    """Writes one answer, and keeps it; an `Encoder` for one that is streamed.

    Args:
        names: of tokens, for logprobs.
        stored: what is kept of it.
        store: where it is kept; None: nowhere.
    """

    def __init__(
        self,
        body: ResponsesRequest,
        generation: Generation,
        names: TokenNames,
        stored: StoredResponse,
        store: ResponseStore | None,
    ) -> None:
        self._body, self._generation, self._names, self._stored = body, generation, names, stored
        self._item_id = f"msg_{generation.id}"
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._reason: str | None = None
        self._sequence = 0
        stored.cancel = self.cancel
        generation.on_close = self.abandon
        if store is not None:
            store.put(stored)

    @property
    def response(self) -> dict[str, Any]:
        """The answer as far as it is known."""
        return self._stored.body

    def add(self, sample: CompletionOutput) -> list[TokenLogprob]:
        """Takes what is new, and gives its logprobs."""
        self._text.append(sample.text)
        self._reason = sample.finish_reason
        new: list[TokenLogprob] = []
        if sample.logprobs and self._body.wants_logprobs:
            new = chat_logprobs(sample.logprobs, self._names, self._body.top_logprobs or 0)["content"]
            self._logprobs += new
        return new

    def finish(self) -> dict[str, Any]:
        """The answer, done."""
        incomplete = self._reason == "length"
        status = "incomplete" if incomplete else "completed"
        details = {"reason": "max_output_tokens"} if incomplete else None
        self._set(status, incomplete_details=details, output=[self._item(status)], usage=self._usage())
        self._stored.messages.append({"role": "assistant", "content": "".join(self._text)})
        return self.response

    def fail(self, error: ApiError) -> dict[str, Any]:
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
        """The empty answer with its empty message."""
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)
        item = {**self._item("in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place(), part=self._part())

    def encode(self, prompt: int, output: RequestOutput) -> Iterable[bytes]:
        """What is new of the text."""
        for sample in output.outputs:
            logprobs = self.add(sample)
            if sample.text or logprobs:
                place = self._place()
                yield self._event("response.output_text.delta", **place, delta=sample.text, logprobs=logprobs)

    def end(self) -> Iterable[bytes]:
        """The whole text and the whole answer."""
        response = self.finish()
        text = "".join(self._text)
        place = self._place()
        yield self._event("response.output_text.done", **place, text=text, logprobs=self._logprobs)
        yield self._event("response.content_part.done", **place, part=self._part())
        yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
        yield self._event(f"response.{response['status']}", response=response)

    def error(self, error: ApiError) -> Iterable[bytes]:
        """The failed answer; one that was cancelled says so."""
        if self.response["status"] != "cancelled":
            self.fail(error)
        return (self._event("response.failed", response=self.response),)

    def _set(self, status: str, **fields: Any) -> None:
        self._stored.body = {**self._stored.body, "status": status, **fields}
        self._stored.cancel = None

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event(data, kind)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _part(self) -> dict[str, Any]:
        text = "".join(self._text)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _item(self, status: str) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [self._part()],
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


def new_response(
    body: ResponsesRequest, generation: Generation, model: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """An answer that has just begun.

    Args:
        defaults: the temperature and top_p that the request is served with.
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
        "parallel_tool_calls": True,
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "text": {"format": body.format},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        **defaults,
    }
