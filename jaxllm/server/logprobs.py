"""Tokens and their log probabilities in the forms of the OpenAI API."""

from collections.abc import Mapping, Sequence

from typing_extensions import TypedDict

from jaxllm.engine.outputs import Logprob, PromptLogprobs
from jaxllm.engine.vocabulary import Vocabulary

LEAST = -9999.0
"""Stands for log 0, which JSON cannot say; OpenAI and vLLM write the same."""
Position = Mapping[int, Logprob]
"""The logprobs at a position: its own token first, then the likeliest."""


class TopLogprob(TypedDict):
    """A token that could have stood at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token of a position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """https://platform.openai.com/docs/api-reference/chat/object"""

    content: list[TokenLogprob]


class CompletionLogprobs(TypedDict):
    """https://platform.openai.com/docs/api-reference/completions/object"""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class RankedLogprob(TypedDict):
    """A token's entry in vLLM's `prompt_logprobs`."""

    logprob: float
    rank: int | None
    decoded_token: str | None


class TokenNames:
    """What tokens are called in an answer.

    Args:
        vocabulary: None where there is no tokenizer; then tokens are called by their ids.
        as_ids: call them "token_id:123", so that no two have the same name.
    """

    def __init__(self, vocabulary: Vocabulary | None, *, as_ids: bool = False) -> None:
        self._vocabulary = vocabulary
        self._as_ids = as_ids or vocabulary is None

    def data(self, token_id: int) -> bytes | None:
        """The token's bytes, which may be a part of a character."""
        return None if self._vocabulary is None else self._vocabulary.token_bytes(token_id)

    def name(self, token_id: int) -> str:
        """The token's text, with U+FFFD for what is not UTF-8."""
        if self._as_ids:
            return f"token_id:{token_id}"
        return (self.data(token_id) or b"").decode("utf-8", "replace")


def chat_logprobs(positions: Sequence[Position], names: TokenNames, top: int) -> ChatLogprobs:
    """Logprobs as chats have them, each with the `top` likeliest tokens."""

    def entry(token_id: int, logprob: Logprob) -> TopLogprob:
        data = names.data(token_id)
        return {
            "token": names.name(token_id),
            "logprob": max(logprob.logprob, LEAST),
            "bytes": None if data is None else list(data),
        }

    content: list[TokenLogprob] = []
    for position in positions:
        token_id, own = next(iter(position.items()))
        likeliest = [entry(other, logprob) for other, logprob in _likeliest(position, top)]
        content.append({**entry(token_id, own), "top_logprobs": likeliest})
    return {"content": content}


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[Position | None],
    names: TokenNames,
    top: int,
    offset: int,
) -> CompletionLogprobs:
    """Logprobs as completions have them.

    Args:
        positions: one for each token; None for the prompt's first, which nothing predicts.
        top: likeliest tokens of each position, besides its own.
        offset: where in the text the first token begins.
    """
    found: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, position in zip(token_ids, positions, strict=True):
        name = names.name(token_id)
        found["tokens"].append(name)
        found["text_offset"].append(offset)
        offset += len(name)
        if position is None:
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        shown: dict[str, float] = {}
        for other, logprob in [*_likeliest(position, top), (token_id, position[token_id])]:
            shown.setdefault(names.name(other), max(logprob.logprob, LEAST))
        found["token_logprobs"].append(max(position[token_id].logprob, LEAST))
        found["top_logprobs"].append(shown)
    return found


def prompt_logprobs(positions: PromptLogprobs | None) -> list[dict[str, RankedLogprob] | None] | None:
    """A prompt's logprobs as vLLM gives them: by token id."""
    if positions is None:
        return None
    return [None if position is None else _ranked(position) for position in positions]


def _ranked(position: Position) -> dict[str, RankedLogprob]:
    return {
        str(token_id): {
            "logprob": max(entry.logprob, LEAST),
            "rank": entry.rank,
            "decoded_token": entry.decoded_token,
        }
        for token_id, entry in position.items()
    }


def _likeliest(position: Position, top: int) -> list[tuple[int, Logprob]]:
    return sorted(position.items(), key=lambda item: -item[1].logprob)[:top]
