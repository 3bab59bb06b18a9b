"""Conversations as text, by a model's chat template."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from converters.tokenizer import TextTokenizer
from jaxllm.engine.time_limit import within

Message = Mapping[str, Any]
"""One turn: `role`, `content` (text, or a list of text parts), and what else the template reads."""
Conversation = Sequence[Message]
MOST_SECONDS = 5.0
"""For a template, which is a program: a conversation of 20 messages takes less than a thousandth."""


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template, or with one given in the call."""

    def __init__(self, tokenizer: TextTokenizer | None) -> None:
        self._tokenizer = tokenizer

    def render(
        self,
        messages: Conversation,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation's text, special tokens included (arguments as in `InputProcessor.render_chat`).

        Raises:
            ValueError: no tokenizer or no template, a message the template refuses, contradicting arguments.
            TypeError: messages of the wrong form.
        """
        if self._tokenizer is None:
            raise ValueError(
                "messages: a chat needs a tokenizer, and this engine has none; pass prompt_token_ids"
            )
        if chat_template is None and not self._tokenizer.chat_template:
            raise ValueError(
                "messages: this model's tokenizer has no chat template (a base model?); "
                "pass chat_template=..., or use generate() with a prompt"
            )
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message=True continues the last message, add_generation_prompt=True starts "
                "a new one; pass add_generation_prompt=False"
            )
        read = [_read_message(message, f"messages[{i}]") for i, message in enumerate(_check_list(messages))]
        variables = dict(chat_template_kwargs or {})
        if clash := _ARGUMENTS.intersection(variables):
            raise ValueError(
                f"chat_template_kwargs: {sorted(clash)} are arguments of their own; pass them as such"
            )
        apply = partial(
            self._tokenizer.apply_chat_template,
            read,
            chat_template=chat_template,
            tools=None if tools is None else [dict(tool) for tool in tools],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **variables,
        )
        try:
            rendered = within(MOST_SECONDS, apply)
        except Exception as error:  # a template is a program of the model's: it may fail in any way
            raise ValueError(f"chat template: {type(error).__name__}: {error}") from error
        return str(rendered)


_ARGUMENTS = frozenset(
    ("chat_template", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "conversation")
)


def _check_list(messages: Any) -> Conversation:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(
            f'messages: must be a list of {{"role": ..., "content": ...}}, not {type(messages).__name__}'
        )
    if not messages:
        raise ValueError("messages: there are none; give at least one")
    return messages


def _read_message(message: Message, name: str) -> dict[str, Any]:
    """A message in the form that templates expect: text content, tool calls' arguments as mappings."""
    if not isinstance(message, Mapping):
        raise TypeError(f'{name}: must be {{"role": ..., "content": ...}}, not {type(message).__name__}')
    if not isinstance(message.get("role"), str):
        raise ValueError(f'{name}: needs a "role" that is a string')
    read = dict(message)
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        read["content"] = _join_parts(content, f"{name}.content")
    if message.get("tool_calls"):
        read["tool_calls"] = [_read_tool_call(call, f"{name}.tool_calls") for call in message["tool_calls"]]
    if content is None:
        read["content"] = ""  # templates add strings to it; a message of tool calls alone has none
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if reasoning is not None:  # clients call it the one or the other, and so do templates
        read["reasoning"] = read["reasoning_content"] = reasoning
    return read


def _join_parts(parts: Any, name: str) -> str:
    if isinstance(parts, Mapping) or not isinstance(parts, Sequence):
        raise TypeError(f"{name}: must be text or a list of text parts, not {type(parts).__name__}")
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(f"{name}: a part of type {kind!r} is not supported; give parts of type 'text'")
    return "\n".join(texts)


def _read_tool_call(call: Any, name: str) -> dict[str, Any]:
    """The OpenAI API writes a call's arguments as a JSON string, templates expect the mapping."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise TypeError(f'{name}: each must be {{"type": "function", "function": {{...}}}}')
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}: arguments of {function.get('name')!r} are not JSON: {error}"
            ) from error
        if not isinstance(function["arguments"], Mapping):
            raise ValueError(f"{name}: arguments of {function.get('name')!r} must be a JSON object")
    return {**call, "function": function}
