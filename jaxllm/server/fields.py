"""The fields that requests for text share, and how those that are not served are refused.

Names and meanings: https://platform.openai.com/docs/api-reference and, for what goes beyond it,
https://docs.vllm.ai/en/stable/serving/openai_compatible_server/. Ranges are checked where they are defined,
by `SamplingParams` and the engine; here only types are.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from jaxllm.server.errors import CONSTRAINT, ApiError
from jaxllm.structured import StructuredOutputsParams

NOT_THERE: tuple[Any, ...] = (None, False, [], {}, "")
"""Values that ask for nothing."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Tokens = list[int]
Constraint = dict[str, Any]
"""Fields of `StructuredOutputsParams`."""
Refusals = dict[str, tuple[tuple[Any, ...], str]]
"""Parameters that are not served: values that ask for nothing besides `NOT_THERE`, and what to do instead."""

REFUSED: Refusals = {
    "guided_decoding_backend": (("auto", "guidance"), "there is one way to compile grammars"),
    "use_beam_search": ((), "search with beams is there in Python only: Engine.beam_search"),
    "length_penalty": ((1.0,), "it belongs to beam search, which is there in Python only"),
    "best_of": ((1,), "ask for n outputs and choose among them"),
    "logits_processors": ((), "processors are there in Python only: SamplingParams(logits_processors=...)"),
    "vllm_xargs": ((), "there are no extensions that would read them"),
    "kv_transfer_params": ((), "prompts and outputs are computed by the same server"),
    "mm_processor_kwargs": ((), "models here read text only"),
}
"""What neither chats nor completions are served with."""

OF_CONVERSATIONS: Refusals = {
    "moderation": ((), "there is no moderation"),
    "prompt_cache_options": ((), "prompts that begin alike share a cache by themselves"),
    "prompt_cache_retention": ((), "prompts are kept as long as there is room"),
}
"""What neither `/v1/chat/completions` nor `/v1/responses` is served with."""


def refuse(data: Any, refused: Refusals) -> Any:
    """A request's fields without those of `refused` that ask for nothing.

    Raises:
        PydanticCustomError: one that asks for something; the error names it and says what to do instead.
    """
    if not isinstance(data, dict):
        return data
    kept = {}
    for name, value in data.items():
        if name not in refused:
            kept[name] = value
            continue
        accepted, advice = refused[name]
        if not any(value == off and type(value) is type(off) for off in (*NOT_THERE, *accepted)):
            message = f"{name}: not supported by this server; {advice}"
            raise PydanticCustomError("refused", "{message}", {"param": name, "message": message})
    return kept


class ApiModel(BaseModel):
    """A JSON object of a request: no value is converted, and no unknown field goes by."""

    model_config = ConfigDict(extra="forbid", strict=True)
    refused: ClassVar[Refusals] = {}
    """Fields that are known, and not served."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        return refuse(data, cls.refused) if cls.refused else data


class StreamOptions(ApiModel):
    """What a stream brings besides the text."""

    refused: ClassVar[Refusals] = {"include_obfuscation": ((), "chunks are not padded; use TLS")}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(ApiModel):
    """A schema under its name, as in chats. It is kept to whether `strict` is asked for or not."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(ApiModel):
    """The form of a chat's answer: https://platform.openai.com/docs/guides/structured-outputs

    Structural tags are vLLM's; see `StructuredOutputsParams.structural_tag`.
    """

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    format: dict[str, Any] | None = None
    """With structural_tag: a format of XGrammar's."""
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    """The older form of structural_tag."""

    @model_validator(mode="after")
    def _with_its_fields(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema: must be given with type='json_schema', and only then")
        for name in ("format", "structures", "triggers"):
            if getattr(self, name) is not None and self.type != "structural_tag":
                raise ValueError(f"{name}: only with type='structural_tag'")
        return self

    def constraint(self) -> Constraint | None:
        """What the answer is held to."""
        if self.type == "structural_tag":
            return {"structural_tag": self.model_dump(exclude_none=True)}
        return format_constraint(self.type, self.json_schema and self.json_schema.schema_)


class StructuredOutputs(ApiModel):
    """What an output is held to, with the names of `StructuredOutputsParams`."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_additional_properties: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


def format_constraint(kind: str, schema: dict[str, Any] | None) -> Constraint | None:
    """What an answer of an OpenAI format is held to; a format without a schema wants any object."""
    if kind == "text":
        return None
    return {"json_object": True} if schema is None else {"json": schema}


def structured_outputs(name: str, constraint: Constraint) -> StructuredOutputsParams:
    """What was asked for in the parameter `name`.

    Raises:
        ApiError: 400, naming that parameter.
    """
    try:
        return StructuredOutputsParams(**constraint)
    except (TypeError, ValueError) as error:
        # only the parameter of that name has a field for the constraint's kind, which comes first
        said = name if name == CONSTRAINT else next(iter(constraint))
        text = str(error).removeprefix(f"{said}: ")
        raise ApiError(400, f"{name}: {text}", param=name) from error


class GenerationRequest(ApiModel):
    """What chats and completions have in common. None stands for the default, as if it were left out."""

    refused: ClassVar[Refusals] = REFUSED

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Shown in the server's log."""

    n: int | None = None
    temperature: Finite | None = None
    top_p: Finite | None = None
    top_k: int | None = None
    min_p: Finite | None = None
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    repetition_penalty: Finite | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Tokens | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, Finite] | None = None
    allowed_token_ids: Tokens | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    """Older names of what `structured_outputs` has; the pattern goes with any way to ask for JSON."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    guided_whitespace_pattern: str | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None

    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    priority: int | None = None
    request_id: str | None = Field(None, pattern=r"^[\w.:-]{1,128}$")
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @model_validator(mode="after")
    def _streams_with_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk has the usage so far."""
        return bool(self.include_usage and self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(self) -> dict[str, Any]:
        """Those sampling parameters that were given; they have the same names in `SamplingParams`.

        Raises:
            ApiError: 400, the output cannot be held to what is asked.
        """
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        name, constraint = self._constraint()
        if constraint is not None:
            given["structured_outputs"] = structured_outputs(name, constraint)
        return given

    @property
    def constraint_name(self) -> str:
        """The parameter that says what the output is held to."""
        return self._constraint()[0]

    def _constraint(self) -> tuple[str, Constraint | None]:
        """The parameter that says what the output is held to, and what that is."""
        found: dict[str, Constraint] = {}
        if self.response_format is not None and (wanted := self.response_format.constraint()) is not None:
            found["response_format"] = wanted
        if self.structured_outputs is not None:
            found["structured_outputs"] = self.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        for name, kind in OLDER_NAMES.items():
            if (value := getattr(self, name)) is not None:
                found[name] = {kind: value}
        if len(found) > 1:
            text = f"{' and '.join(found)}: an output can be held to one of them; leave the others out"
            raise ApiError(400, text, param=list(found)[1])
        name, constraint = next(iter(found.items()), ("structured_outputs", None))
        if self.guided_whitespace_pattern is not None:
            if constraint is None:
                text = "guided_whitespace_pattern: only with guided_json, or another way to ask for JSON"
                raise ApiError(400, text, param="guided_whitespace_pattern")
            constraint = {**constraint, "whitespace_pattern": self.guided_whitespace_pattern}
        return name, constraint


OLDER_NAMES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
}
"""Fields of `GenerationRequest` that older versions of vLLM have, and of `StructuredOutputs`."""
SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
"""Fields of `GenerationRequest` that are fields of `SamplingParams`."""
