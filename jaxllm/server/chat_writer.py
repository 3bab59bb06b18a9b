"""The answers of `/v1/chat/completions`, whole or as chunks.

https://platform.openai.com/docs/api-reference/chat/object and .../chat/streaming; reasoning stands in the
field `reasoning`, as in vLLM.
"""

from collections.abc import Iterable
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from jaxllm.engine.outputs import CompletionOutput, RequestOutput
from jaxllm.server import logprobs as forms
from jaxllm.server.answer_form import AnswerForm
from jaxllm.server.answer_parts import (
    Answer,
    CallArguments,
    CallBegin,
    Part,
    Reasoning,
    Text,
    ToolCall,
    join_parts,
)
from jaxllm.server.chat_fields import ChatCompletionRequest
from jaxllm.server.chunk_writer import ChunkWriter
from jaxllm.server.generation import Generation, Usage
from jaxllm.server.logprobs import ChatLogprobs, RankedLogprob, TokenNames
from jaxllm.server.service import Service


class FunctionCall(TypedDict):
    """What is called; the arguments are JSON text as the model wrote it, and may be cut off or wrong."""

    name: str
    arguments: str


class MessageToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(TypedDict):
    """The answer of the assistant."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str | None]
    tool_calls: NotRequired[list[MessageToolCall]]


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
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


class ChatWriter(ChunkWriter):
    """Turns outputs into answers; an `Encoder` for those that are streamed."""

    def __init__(
        self,
        body: ChatCompletionRequest,
        form: AnswerForm,
        generation: Generation,
        model: str,
        service: Service,
    ) -> None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        super().__init__(body, generation, id=f"chatcmpl-{generation.id}", kind=kind, model=model)
        self._body, self._form = body, form
        self._names = TokenNames(service.vocabulary, as_ids=bool(body.return_tokens_as_token_ids))
        self._top = service.top_logprobs(body.top_logprobs or 0)
        self._n = generation.inputs[0].params.n
        self._readers = [form.reader(generation.inputs[0].prompt) for _ in range(self._n)]
        self._prompt_sent = False

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = [self._choice(sample) for sample in output.outputs]
        return {**self._head, "choices": choices, "usage": self._generation.usage(), **self._prompt(output)}

    def _choice(self, sample: CompletionOutput) -> dict[str, Any]:
        answer = join_parts(self._readers[sample.index].read(sample.text, finished=True))
        choice = {
            "index": sample.index,
            "message": self._message(answer),
            "logprobs": self._logprobs(sample),
            "finish_reason": self._finish_reason(sample),
            "stop_reason": sample.stop_reason,
        }
        return self._with_tokens(sample, choice)

    def _message(self, answer: Answer) -> ChatMessage:
        silent = not answer.text and (answer.calls or answer.reasoning)
        message: ChatMessage = {
            "role": "assistant",
            "content": None if silent else answer.text,
            "refusal": None,
        }
        if self._form.reasoning_parser is not None and self._form.include_reasoning:
            message["reasoning"] = answer.reasoning or None
        if answer.calls:
            message["tool_calls"] = [_tool_call(call) for call in answer.calls]
        return message

    def _finish_reason(self, sample: CompletionOutput) -> str | None:
        called = self._readers[sample.index].called
        return "tool_calls" if called and sample.finish_reason == "stop" else sample.finish_reason

    def begin(self) -> Iterable[bytes]:
        """Who speaks, for each answer."""
        for index in range(self._n):
            yield self._chunk(self._delta(index, {"role": "assistant", "content": ""}))

    def encode(self, prompt: int, output: RequestOutput) -> Iterable[bytes]:
        """A chunk for each new piece of an answer; logprobs and token ids come with the first."""
        for sample in output.outputs:
            finished = sample.finish_reason is not None
            parts = self._readers[sample.index].read(sample.text, finished=finished)
            deltas = [_delta(part) for part in parts]
            logprobs = self._logprobs(sample)
            if not deltas and (logprobs or finished or self._body.return_token_ids):
                deltas.append({})
            for i, delta in enumerate(deltas):
                choice = self._delta(sample.index, delta, None if i else logprobs)
                if finished and i == len(deltas) - 1:
                    choice |= {
                        "finish_reason": self._finish_reason(sample),
                        "stop_reason": sample.stop_reason,
                    }
                prompt_fields = {} if self._prompt_sent else self._prompt(output)
                self._prompt_sent = True
                yield self._chunk(choice if i else self._with_tokens(sample, choice), **prompt_fields)

    @staticmethod
    def _delta(index: int, delta: dict[str, Any], logprobs: ChatLogprobs | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

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


def _tool_call(call: ToolCall) -> MessageToolCall:
    function: FunctionCall = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _delta(part: Part) -> dict[str, Any]:
    """A piece of an answer as what is new of a message."""
    match part:
        case Text(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning": text}
        case CallBegin(index, name, id):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
