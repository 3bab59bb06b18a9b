"""`/tokenize` and `/detokenize`, as vLLM has them."""

import asyncio
from typing import TYPE_CHECKING, Any, NotRequired

from fastapi import APIRouter
from pydantic import model_validator
from typing_extensions import TypedDict

from jaxllm.server.errors import ApiError, bad_value
from jaxllm.server.fields import ApiModel, Tokens
from jaxllm.server.service import Served, Service
from jaxllm.server.tools import ChatTool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

router = APIRouter()


class TokenizeRequest(ApiModel):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[ChatTool] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError(
                "add_special_tokens: a chat's template writes special tokens itself; leave it out"
            )
        for name in ("continue_final_message", "chat_template_kwargs", "tools"):
            if self.prompt is not None and getattr(self, name):
                raise ValueError(f"{name}: only with messages")
        return self


class TokenizeResponse(TypedDict):
    """The tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str]]


class DetokenizeRequest(ApiModel):
    """Tokens."""

    model: str | None = None
    tokens: Tokens


class DetokenizeResponse(TypedDict):
    """Their text."""

    prompt: str


@router.post("/tokenize", response_model=TokenizeResponse)
async def tokenize(body: TokenizeRequest, service: Served) -> TokenizeResponse:
    """Text or a conversation as tokens."""
    service.model_name(body.model)
    tokenizer = _tokenizer(service)
    tokens = await _tokens(body, service, tokenizer)
    found: TokenizeResponse = {
        "count": len(tokens),
        "max_model_len": service.engine.max_model_len,
        "tokens": tokens,
    }
    if body.return_token_strs:
        found["token_strs"] = tokenizer.convert_ids_to_tokens(tokens)  # pyright: ignore[reportGeneralTypeIssues]
    return found


@router.post("/detokenize", response_model=DetokenizeResponse)
async def detokenize(body: DetokenizeRequest, service: Served) -> DetokenizeResponse:
    """Tokens as text, special ones included."""
    service.model_name(body.model)
    size = len(_tokenizer(service))
    outside = [token for token in body.tokens if not 0 <= token < size]
    if outside:
        raise ApiError(400, f"tokens: {outside[0]} is not in 0 to {size - 1}", param="tokens")
    return {"prompt": await asyncio.to_thread(service.decode, body.tokens)}


async def _tokens(body: TokenizeRequest, service: Service, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if body.messages is None:
        most = service.engine.max_model_len * service.longest_token
        if len(body.prompt or "") > most:
            text = f"prompt: more than {most} characters do not fit into the model; give a part of it"
            raise ApiError(400, text, param="prompt")
        special = True if body.add_special_tokens is None else body.add_special_tokens
        try:
            (body.prompt or "").encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, "prompt: not valid Unicode text", param="prompt") from error
        return await asyncio.to_thread(tokenizer.encode, body.prompt or "", add_special_tokens=special)
    try:
        prompt = await service.engine.render_chat(
            body.messages,
            chat_template=service.chat_template,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            tools=[tool.tool().shown() for tool in body.tools or ()] or None,
            chat_template_kwargs=body.chat_template_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise bad_value(error, TokenizeRequest.model_fields, {}) from error
    return list(prompt.get("prompt_token_ids", ()))


def _tokenizer(service: Service) -> "PreTrainedTokenizerBase":
    engine = service.engine
    if service.vocabulary is None:
        raise ApiError(400, "the server was started without a tokenizer (--skip-tokenizer-init)")
    return engine.get_tokenizer()
