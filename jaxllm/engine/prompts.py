"""The forms a prompt may have."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

_FORMS = 'give a string, a list of token ids, {"prompt": ...}, {"prompt_token_ids": ...}, or a list of these'
_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class TextPrompt(TypedDict, total=False):
    """A prompt as text."""

    prompt: str
    cache_salt: str
    """Prompts with different salts share no prefix cache (as tenants should not)."""


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids; its text, if given, is only shown in the output."""

    prompt_token_ids: Sequence[int]
    prompt: str
    cache_salt: str


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt


class PromptParts(NamedTuple):
    """A prompt's form taken apart."""

    text: str | None
    token_ids: Sequence[int] | None
    cache_salt: str | None


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts of one call: a string, a dict or a list of ints is one prompt, any other list several.

    Raises:
        TypeError: neither a prompt nor a list of prompts.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not is_list(prompts):
        raise TypeError(f"prompts: {type(prompts).__name__} is not a prompt; {_FORMS}")
    if len(prompts) and not any(isinstance(item, str | Mapping) or is_list(item) for item in prompts):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType]


def take_apart(prompt: Prompt) -> PromptParts:
    """A prompt's text, token ids (as they were given, unchecked) and cache salt, whatever its form.

    Raises:
        TypeError: not a prompt, or a key's value of the wrong type.
        ValueError: a dict with unknown keys, or with neither text nor token ids.
    """
    if isinstance(prompt, str):
        return PromptParts(prompt, None, None)
    if not isinstance(prompt, Mapping):
        if isinstance(prompt, bytes) or not is_list(prompt):
            raise TypeError(f"prompt: {type(prompt).__name__} is not a prompt; {_FORMS}")
        return PromptParts(None, prompt, None)
    unknown = [key for key in prompt if key not in _KEYS]
    if unknown:
        raise ValueError(f"prompt: unknown keys {unknown}; known are {', '.join(_KEYS)}")
    text, token_ids, salt = (prompt.get(key) for key in _KEYS)
    if text is None and token_ids is None:
        raise ValueError('prompt: a dict needs "prompt" or "prompt_token_ids"')
    if text is not None and not isinstance(text, str):
        raise TypeError(f'prompt["prompt"]: must be a string, not {type(text).__name__}')
    if token_ids is not None and not is_list(token_ids):
        raise TypeError(
            f'prompt["prompt_token_ids"]: must be a list of token ids, not {type(token_ids).__name__}'
        )
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValueError(f"cache_salt={salt!r}: must be a string that is not empty")
    return PromptParts(text, token_ids, salt)  # pyright: ignore[reportArgumentType]


def is_list(value: object) -> bool:
    """Whether it is list-like: lists, tuples, and one-dimensional arrays."""
    if isinstance(value, str | bytes | Mapping):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", None) == 1
