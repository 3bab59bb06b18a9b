"""The chunks of a stream, as chats and completions of OpenAI's interface have them."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from jaxllm.server.errors import ApiError
from jaxllm.server.event_stream import DONE, event
from jaxllm.server.fields import GenerationRequest
from jaxllm.server.generation import Generation


class ChunkWriter:
    """Writes chunks under one head, with the usage where it is asked for; a base of `Encoder`s.

    Args:
        id: of the answer.
        kind: what a chunk is, or the whole answer.
        model: its name.
    """

    def __init__(
        self, body: GenerationRequest, generation: Generation, *, id: str, kind: str, model: str
    ) -> None:
        self._generation = generation
        self._include_usage, self._continuous_usage = body.include_usage, body.continuous_usage
        self._head: dict[str, Any] = {"id": id, "object": kind, "created": int(time.time()), "model": model}

    def end(self) -> Iterable[bytes]:
        """The usage, if it was asked for."""
        if self._include_usage:
            yield event({**self._head, "choices": [], "usage": self._generation.usage()})
        yield DONE

    def error(self, error: ApiError) -> Iterable[bytes]:
        """The error as a chunk."""
        return (event(error.body()), DONE)

    def _chunk(self, choice: Mapping[str, Any], **more: Any) -> bytes:
        chunk = {**self._head, "choices": [choice], **more}
        if self._continuous_usage:
            chunk["usage"] = self._generation.usage()
        elif self._include_usage:
            chunk["usage"] = None
        return event(chunk)
