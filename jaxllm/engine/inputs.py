"""Requests as the engine runs them: prompts tokenized, every parameter checked against the model."""

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from converters.tokenizer import TextTokenizer, longest_token
from jaxllm.engine.chat import ChatTemplate, Conversation
from jaxllm.engine.prompts import Prompt, PromptParts, TokensPrompt, is_list, split_prompts, take_apart
from jaxllm.sampling.params import SamplingParams

if TYPE_CHECKING:
    from concurrent.futures import Future

    from jaxllm.structured.compiler import GrammarCompiler
    from jaxllm.structured.grammar import Grammar


@dataclass(frozen=True)
class EngineInput:
    """A request that has passed every check."""

    prompt: str | None
    """The prompt's text, if it is known."""
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    """What the caller asked for, or the model's own defaults."""
    max_tokens: int
    """Most output tokens, as many as asked for that fit into the model's length; at least 1."""
    eos_token_ids: frozenset[int] = frozenset()
    """Tokens that end an output as end of sequence; empty with ignore_eos."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end an output as the caller's own stop tokens."""
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that may not come up."""
    num_logprobs: int | None = None
    """Likeliest tokens whose logprobs each output token brings along; None: no logprobs at all."""
    num_prompt_logprobs: int | None = None
    """The same for each prompt token."""
    grammar: "Grammar | None" = None
    """What outputs are held to."""
    cache_salt: str | None = None
    priority: int = 0
    """Lower values are served first, where the scheduler's policy is priority."""


class InputProcessor:
    """Makes requests from prompts and parameters, and refuses what cannot be served.

    Args:
        tokenizer: None where there is none: then prompts are token ids, and outputs have no text.
        vocab_size: tokens that the model knows.
        max_model_len: most tokens of a request, prompt and output.
        max_logprobs: most logprobs per position; -1: the whole vocabulary.
        eos_token_ids: the model's end-of-sequence tokens (see `find_eos_token_ids`).
        default_params: what requests without parameters get (see `default_sampling_params`).
        grammars: compiles what outputs are to be held to; None if there is no tokenizer.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        max_logprobs: int = 20,
        eos_token_ids: Collection[int] = (),
        default_params: SamplingParams | None = None,
        grammars: "GrammarCompiler | None" = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_logprobs = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
        self.eos_token_ids = frozenset(eos_token_ids)
        default_params = default_params or SamplingParams()
        without_text = tokenizer is None and default_params.detokenize
        self.default_params = replace(default_params, detokenize=False) if without_text else default_params
        self._chat = ChatTemplate(tokenizer)
        self._grammars = grammars

    def make(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> EngineInput:
        """Checks one request and makes it ready to run.

        Args:
            prompt: text, token ids, or a dict with either (`TextPrompt`, `TokensPrompt`).
            params: None: the model's own defaults.
            priority: lower values are served first, where the scheduler's policy is priority.
            add_special_tokens: let the tokenizer add its own (such as the beginning of sequence) to a text
                prompt.
            truncate_prompt_tokens: keep only this many of the prompt's last tokens; -1: as many as leave
                room for `max_tokens` (or one) output tokens.

        Raises:
            ValueError: a value that cannot be served, empty or too long prompts among them; the message
                names the field and the fix.
            TypeError: a prompt or parameter of the wrong type.
        """
        params = self.default_params if params is None else _sampling_params(params)
        parts = take_apart(prompt)
        token_ids = self._token_ids(parts, add_special_tokens=add_special_tokens)
        if truncate_prompt_tokens is not None:
            token_ids = token_ids[-self._kept(truncate_prompt_tokens, params) :]
        self._check_length(len(token_ids))
        self._check_params(params)
        return EngineInput(
            prompt=parts.text,
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=min(params.max_tokens or self.max_model_len, self.max_model_len - len(token_ids)),
            eos_token_ids=frozenset() if params.ignore_eos else self.eos_token_ids,
            stop_token_ids=frozenset(params.stop_token_ids or ()),
            bad_word_ids=self._bad_word_ids(params.bad_words or ()),
            num_logprobs=self._num_logprobs("logprobs", params.logprobs),
            num_prompt_logprobs=self._num_logprobs("prompt_logprobs", params.prompt_logprobs),
            grammar=self._grammar(params),
            cache_salt=parts.cache_salt,
            priority=_integer("priority", priority),
        )

    def make_batch(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EngineInput]:
        """Makes the requests of one call: one prompt or a list, one set of parameters or one for each prompt.

        Raises:
            ValueError, TypeError: as `make` does, naming the prompt's place; nothing has been added then.
        """
        prompts = split_prompts(prompts)
        all_params = _for_each("sampling_params", params, len(prompts))
        for own_params in all_params:
            self.begin_grammar(own_params)  # so that they are compiled at the same time
        priorities = _for_each("priority", priority, len(prompts))
        made = []
        for i, (prompt, own_params, own_priority) in enumerate(
            zip(prompts, all_params, priorities, strict=True)
        ):
            try:
                made.append(
                    self.make(
                        prompt,
                        own_params,
                        priority=own_priority,
                        add_special_tokens=add_special_tokens,
                        truncate_prompt_tokens=truncate_prompt_tokens,
                    )
                )
            except (TypeError, ValueError) as error:
                if len(prompts) == 1:
                    raise
                raise _prefixed(f"prompts[{i}]", error) from error
        return made

    def render_chat(
        self,
        messages: Conversation,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TokensPrompt:
        """A conversation as a prompt. The template writes special tokens itself, so the tokenizer adds none.

        Args:
            messages: the conversation's messages, each with a role and content.
            chat_template: a Jinja template to use instead of the tokenizer's own.
            add_generation_prompt: end with what introduces the assistant's answer.
            continue_final_message: leave the last message open, for the model to go on writing it.
            tools: functions that the model may call, as JSON schemas.
            chat_template_kwargs: more variables for the template (such as `enable_thinking`).

        Raises:
            ValueError: no tokenizer or no template, a message the template refuses, contradicting arguments.
            TypeError: messages of the wrong form.
        """
        text = self._chat.render(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return TokensPrompt(prompt=text, prompt_token_ids=self._encode(text, add_special_tokens=False))

    def close(self) -> None:
        """Ends the threads that compile grammars."""
        if self._grammars is not None:
            self._grammars.close()

    def begin_grammar(self, params: object) -> "Future[Grammar] | None":
        """Starts to compile what outputs are to be held to, which `make` waits for; None for anything."""
        structured = params.structured_outputs if isinstance(params, SamplingParams) else None
        if structured is None or self._grammars is None:
            return None
        return self._grammars.begin(structured)

    def _grammar(self, params: SamplingParams) -> "Grammar | None":
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            raise ValueError("structured_outputs: needs a tokenizer, and there is none; leave it out")
        return self._grammars.compile(params.structured_outputs)

    def _token_ids(self, parts: PromptParts, *, add_special_tokens: bool) -> tuple[int, ...]:
        if parts.token_ids is None:
            return tuple(self._encode(parts.text or "", add_special_tokens=add_special_tokens))
        token_ids = tuple(_integer("prompt_token_ids", token_id) for token_id in parts.token_ids)
        self._check_token_ids("prompt_token_ids", token_ids)
        return token_ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(
                "prompt: text needs a tokenizer, and this engine has none; pass prompt_token_ids"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt: not valid Unicode text: {error}") from error
        self._check_size(text)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _check_size(self, text: str) -> None:
        """Refuses what cannot fit before it is tokenized: 8 MB take 20 s."""
        if len(text) <= self.max_model_len:
            return
        most = self.max_model_len * self._longest_token
        if len(text) > most:
            raise ValueError(
                f"prompt: {len(text)} characters; more than {most} do not fit into "
                f"max_model_len={self.max_model_len}, whatever they are; shorten it"
            )

    @cached_property
    def _longest_token(self) -> int:
        assert self.tokenizer is not None
        return longest_token(self.tokenizer)

    def _kept(self, count: int, params: SamplingParams) -> int:
        count = _integer("truncate_prompt_tokens", count)
        if count == -1:
            return max(1, self.max_model_len - (params.max_tokens or 1))
        if count < 1:
            raise ValueError(f"truncate_prompt_tokens={count}: must be -1 or at least 1")
        return count

    def _check_length(self, length: int) -> None:
        if length == 0:
            raise ValueError(
                "prompt: it has no tokens; give it at least one (this tokenizer adds none by itself)"
            )
        if length >= self.max_model_len:
            raise ValueError(
                f"prompt: {length} tokens and one more do not fit into max_model_len={self.max_model_len}; "
                "shorten it, pass truncate_prompt_tokens, or make the engine with a larger max_model_len"
            )

    def _check_token_ids(self, name: str, token_ids: Collection[int]) -> None:
        outside = [token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size]
        if outside:
            shown = ", ".join(map(str, outside[:5])) + (", ..." if len(outside) > 5 else "")
            raise ValueError(
                f"{name}: {shown} not in the model's vocabulary; token ids go from 0 to {self.vocab_size - 1}"
            )

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("allowed_token_ids", "stop_token_ids", "logit_bias"):
            self._check_token_ids(name, getattr(params, name) or ())
        if self.tokenizer is not None:
            return
        if params.stop:
            raise ValueError("stop: stop strings need a tokenizer, and there is none; pass stop_token_ids")
        if params.bad_words:
            raise ValueError("bad_words: words need a tokenizer, and there is none; leave them out")
        if params.detokenize:
            raise ValueError(
                "detokenize=True: text needs a tokenizer, and there is none; pass detokenize=False"
            )

    def _num_logprobs(self, name: str, count: int | None) -> int | None:
        if count is None:
            return None
        resolved = self.vocab_size if count == -1 else count
        if resolved > self.max_logprobs:
            raise ValueError(
                f"{name}={count}: at most {self.max_logprobs} here; ask for fewer, or make the engine with "
                "a larger max_logprobs (-1: the whole vocabulary)"
            )
        return resolved

    def _bad_word_ids(self, bad_words: Collection[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences that spell each bad word, at the beginning of a text and after a space."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in bad_words:
            start = tuple(self._encode(word.lstrip(), add_special_tokens=False))
            if not start:
                raise ValueError(f"bad_words: {word!r} has no tokens; leave it out")
            sequences[start] = None
            inner = tuple(self._encode(" " + word.lstrip(), add_special_tokens=False))
            # As in vLLM: only if the space has gone into the first token, rather than standing before the
            # same ones.
            if len(inner) == len(start) and inner[0] != start[0]:
                sequences[inner] = None
        for sequence in sequences:
            self._check_token_ids("bad_words", sequence)
        return tuple(sequences)


def default_sampling_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """The parameters that a checkpoint's generation_config.json suggests, for requests that come without any.

    Raises:
        ValueError: a value out of range; the message names the file and the field.
    """
    given = {
        ours: generation_config[theirs]
        for theirs, ours in _GENERATION_CONFIG_FIELDS.items()
        if generation_config.get(theirs) is not None
    }
    try:
        return SamplingParams(**given)
    except (TypeError, ValueError) as error:
        raise _prefixed("generation_config.json", error) from error


def find_eos_token_ids(
    tokenizer: TextTokenizer | None, generation_config: Mapping[str, Any], config: Mapping[str, Any]
) -> frozenset[int]:
    """A model's end-of-sequence tokens.

    They are the tokenizer's and generation_config.json's; config.json's only if neither names any.
    """
    found = set(_id_list(generation_config.get("eos_token_id")))
    if tokenizer is not None:
        found.update(_id_list(tokenizer.eos_token_id))
    return frozenset(found or _id_list(config.get("eos_token_id")))


_GENERATION_CONFIG_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def _sampling_params(params: object) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params: must be SamplingParams, not {type(params).__name__}")
    return params


def _for_each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each prompt, from one for all or a list of as many."""
    if not is_list(value):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: {len(value)} given for {count} prompts; give one for all, or one for each")
    return list(value)


def _integer(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"{name}: {value!r} is not a whole number") from None


def _prefixed(place: str, error: TypeError | ValueError) -> TypeError | ValueError:
    kind = TypeError if isinstance(error, TypeError) else ValueError
    return kind(f"{place}: {error}")


def _id_list(value: Any) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
