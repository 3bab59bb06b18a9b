"""The answers of `/v1/responses`, and the events of one that is streamed.

https://platform.openai.com/docs/api-reference/responses/object and .../responses-streaming
"""

from typing import Any, Literal

from typing_extensions import TypedDict

from jaxllm.server.logprobs import TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(TypedDict):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputReasoningText(TypedDict):
    """Some reasoning."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(TypedDict):
    """A text."""

    id: str
    status: ItemStatus
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(TypedDict):
    """Reasoning."""

    id: str
    status: ItemStatus
    type: Literal["reasoning"]
    summary: list[Any]
    content: list[OutputReasoningText]


class OutputFunctionCall(TypedDict):
    """A call of a tool; the arguments are JSON text as the model wrote it, and may be cut off or wrong."""

    id: str
    status: ItemStatus
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


OutputPart = OutputText | OutputReasoningText
OutputItem = OutputMessage | OutputReasoning | OutputFunctionCall


class InputTokensDetails(TypedDict):
    """Where a prompt's tokens came from."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    """What tokens were generated for."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(TypedDict):
    """Why an answer failed."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    """Why an answer ended early."""

    reason: Literal["max_output_tokens"]


class TextForm(TypedDict):
    """What the text was held to."""

    format: dict[str, Any]


class ShownTool(TypedDict):
    """A tool that the answer may call."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class ResponseObject(TypedDict):
    """An answer, done or on its way."""

    id: str
    object: Literal["response"]
    created_at: int
    status: ResponseStatus
    background: bool
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float
    text: TextForm
    tool_choice: str | dict[str, Any]
    tools: list[ShownTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class DeletedResponse(TypedDict):
    """An answer that is no longer kept."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ResponseEvent(TypedDict):
    """The answer as a whole: at the beginning without, at the end with its items."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: ResponseObject


class ItemEvent(TypedDict):
    """An item begins or is done."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class _OfItem(TypedDict):
    sequence_number: int
    item_id: str
    output_index: int


class PartEvent(_OfItem):
    """The content of an item begins or is done."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: OutputPart


class TextDeltaEvent(_OfItem):
    """Text that is new."""

    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: list[TokenLogprob]


class TextDoneEvent(_OfItem):
    """All of a text."""

    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: list[TokenLogprob]


class ReasoningDeltaEvent(_OfItem):
    """Reasoning that is new."""

    type: Literal["response.reasoning_text.delta"]
    content_index: int
    delta: str


class ReasoningDoneEvent(_OfItem):
    """All of some reasoning."""

    type: Literal["response.reasoning_text.done"]
    content_index: int
    text: str


class ArgumentsDeltaEvent(_OfItem):
    """A piece of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_OfItem):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


ResponseStreamEvent = (
    ResponseEvent
    | ItemEvent
    | PartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ReasoningDeltaEvent
    | ReasoningDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
)
"""The data of one event of a stream."""
