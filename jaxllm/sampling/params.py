"""What a request asks of the sampler: vLLM's names, defaults and meanings.

https://docs.vllm.ai/en/stable/api/vllm/sampling_params.html

Everything that can be checked without a model is checked here, when the parameters are made; what needs the
vocabulary, the tokenizer or the engine's limits is checked when the request is added.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from jaxllm.structured.params import StructuredOutputsParams

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this take the likeliest token."""
MAX_SEQUENCES = 16384
"""Most outputs of one request, as in vLLM."""
MAX_LOGIT_BIAS = 100.0
"""Biases are clamped to this size, as in the OpenAI API."""
_SEED_RANGE = (-(2**63), 2**64 - 1)


class RequestOutputKind(Enum):
    """What each output handed out for a request holds."""

    CUMULATIVE = 0
    """All tokens and text so far."""
    DELTA = 1
    """Only what is new since the last output."""
    FINAL_ONLY = 2
    """One output, when the request has finished."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, when to stop, and what to return.

    Immutable: make a changed copy with `dataclasses.replace`. Lists are kept as tuples.

    Raises:
        ValueError: a value that is out of range or not finite; the message names the field.
        TypeError: a value of the wrong type, or a parameter that does not exist.
    """

    n: int = 1
    """Outputs for the prompt."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the output already has; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that the output has it; -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides the positive, and multiplies the negative, logits of tokens in the prompt or the output."""
    temperature: float = 1.0
    """Divides the logits before sampling; below 1e-5 the likeliest token is taken."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability; in (0, 1]."""
    top_k: int = 0
    """Keep this many of the likeliest tokens, and those as likely as the last of them; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the likeliest; 0 to 1."""
    seed: int | None = None
    """Same seed, same tokens, whatever else runs; 64 bits. None or -1 draws one."""
    stop: str | Sequence[str] | None = None
    """Strings that end the output."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens that end the output."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    max_tokens: int | None = 16
    """Most tokens of an output; None: as many as the model's length allows."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many."""
    logprobs: int | None = None
    """Likeliest tokens whose log probabilities come with each output token's own; -1: all tokens."""
    prompt_logprobs: int | None = None
    """The same for each prompt token."""
    detokenize: bool = True
    """Whether to make text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    spaces_between_special_tokens: bool = True
    """Put spaces between special tokens in the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string that was met in the text."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """What each output holds."""
    logit_bias: Mapping[int, float] | Mapping[str, float] | None = None
    """Added to the logits of these token ids; clamped to [-100, 100]."""
    allowed_token_ids: Sequence[int] | None = None
    """Only these tokens may be chosen."""
    bad_words: Sequence[str] | None = None
    """Strings whose last token is not chosen where it would complete them."""
    skip_reading_prefix_cache: bool | None = None
    """Compute the whole prompt. None: only where prompt_logprobs needs it."""
    logits_processors: Sequence[str] = ()
    """Names of registered logits processors to apply, in the order of their registration."""
    extra_args: Mapping[str, Mapping[str, float]] | None = None
    """Parameters of the chosen logits processors: {name: {parameter: value}}."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the output must be, such as JSON of a schema."""

    def __post_init__(self) -> None:
        for name, kind in _NUMBERS.items():
            _set(self, name, kind(name, getattr(self, name)))
        for name in _FLAGS:
            _flag(name, getattr(self, name))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(f"output_kind={self.output_kind!r}: must be a RequestOutputKind")
        structured = self.structured_outputs
        if not isinstance(structured, StructuredOutputsParams | None):
            raise TypeError(f"structured_outputs={structured!r}: must be a StructuredOutputsParams")
        self._read_lists()
        self._check_ranges()
        self._check_together()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_TEMPERATURE

    def _read_lists(self) -> None:
        _set(self, "stop", _strings("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        _set(self, "bad_words", _strings("bad_words", self.bad_words))
        _set(self, "logits_processors", _strings("logits_processors", self.logits_processors))
        _set(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            _set(self, "allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            _require(
                len(self.allowed_token_ids) > 0, "allowed_token_ids", [], "None or at least one token id"
            )
        if self.logit_bias is not None:
            _set(self, "logit_bias", _biases(self.logit_bias))
        _set(self, "extra_args", _processor_parameters(self.extra_args, self.logits_processors))

    def _check_ranges(self) -> None:
        _require(1 <= self.n <= MAX_SEQUENCES, "n", self.n, f"in 1 to {MAX_SEQUENCES}")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "in [-2, 2]")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "more than 0")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= -1, "top_k", self.top_k, "-1 or 0 (all tokens), or at least 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        if self.seed is not None:
            low, high = _SEED_RANGE
            _require(low <= self.seed <= high, "seed", self.seed, "a 64-bit number")
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "None or at least 1")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _require(
                count is None or count >= -1, name, count, "None, -1 (the whole vocabulary), or 0 or more"
            )

    def _check_together(self) -> None:
        limit = self.max_tokens
        if limit is not None:
            _require(self.min_tokens <= limit, "min_tokens", self.min_tokens, f"at most max_tokens={limit}")
        _require(self.detokenize or not self.stop, "stop", self.stop, "left out when detokenize is False")
        if self.seed == -1:
            _set(self, "seed", None)
        if self.greedy:
            _require(self.n == 1, "n", self.n, "1 with temperature 0: all outputs would be the same")
            for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                _set(self, name, off)
        if self.skip_reading_prefix_cache is None:
            _set(self, "skip_reading_prefix_cache", self.prompt_logprobs is not None)


@dataclass(frozen=True)
class BeamSearchParams:
    """How to search for the likeliest outputs with beams.

    Raises:
        ValueError: a value that is out of range or not finite; the message names the field.
        TypeError: a value of the wrong type.
    """

    beam_width: int
    """Beams kept at each step, and outputs returned."""
    max_tokens: int
    """Most tokens of an output."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    temperature: float = 0.0
    """Divides the logits before their log probabilities are taken; 0 leaves them as they are."""
    length_penalty: float = 1.0
    """Outputs are ranked by log probability / length ** length_penalty."""
    include_stop_str_in_output: bool = False
    """Keep the end-of-sequence token's text."""

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            _set(self, name, _integer(name, getattr(self, name)))
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("temperature", "length_penalty"):
            _set(self, name, _number(name, getattr(self, name)))
        _require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        for name in ("ignore_eos", "include_stop_str_in_output"):
            _flag(name, getattr(self, name))


def _set(params: object, name: str, value: object) -> None:
    object.__setattr__(params, name, value)


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {wanted}")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False")


def _number(name: str, value: Any) -> float:
    if isinstance(value, str | bytes | bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}={value!r}: must be a number")
    number = float(value)
    _require(math.isfinite(number), name, value, "a finite number")
    return number


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={value!r}: must be a whole number")
    return operator.index(value)


def _optional_integer(name: str, value: Any) -> int | None:
    return None if value is None else _integer(name, value)


def _count(name: str, value: Any) -> int | None:
    """A number of logprobs; True means 1, as in vLLM and the OpenAI chat API."""
    return 1 if value is True else _optional_integer(name, value)


def _strings(name: str, values: Any) -> tuple[str, ...]:
    if values is None:
        return ()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name}={values!r}: must be a list of strings")
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{name} has {value!r}: must hold strings only")
        _require(bool(value), name, list(values), "without empty strings")
    return tuple(dict.fromkeys(values))


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    if values is None:
        return ()
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}={values!r}: must be a list of token ids")
    ids = tuple(dict.fromkeys(_integer(name, value) for value in values))
    for token in ids:
        _require(token >= 0, name, token, "token ids of 0 or more")
    return ids


def _biases(biases: Any) -> dict[int, float]:
    if not isinstance(biases, Mapping):
        raise TypeError(f"logit_bias={biases!r}: must be a mapping of token ids to biases")
    read: dict[int, float] = {}
    for key, value in biases.items():
        if isinstance(key, str):
            # the OpenAI API's JSON has its keys as strings
            _require(key.strip().isdecimal(), "logit_bias", key, "keyed by token ids")
            token = int(key)
        else:
            token = _integer("logit_bias", key)
        _require(token >= 0, "logit_bias", key, "keyed by token ids of 0 or more")
        _require(token not in read, "logit_bias", key, "without the same token twice")
        read[token] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, _number(f"logit_bias[{key!r}]", value)))
    return read


def _processor_parameters(extra: Any, processors: Sequence[str]) -> dict[str, dict[str, float]]:
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        raise TypeError(f"extra_args={extra!r}: must be a mapping of processors' names to their parameters")
    read: dict[str, dict[str, float]] = {}
    for name, values in extra.items():
        _require(name in processors, "extra_args", name, f"keyed by names in logits_processors={processors}")
        if not isinstance(values, Mapping):
            raise TypeError(f"extra_args[{name!r}]={values!r}: must be a mapping of parameters to numbers")
        read[name] = {key: _number(f"extra_args[{name!r}][{key!r}]", value) for key, value in values.items()}
    return read


_NUMBERS = {
    "n": _integer,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "repetition_penalty": _number,
    "temperature": _number,
    "top_p": _number,
    "top_k": _integer,
    "min_p": _number,
    "seed": _optional_integer,
    "max_tokens": _optional_integer,
    "min_tokens": _integer,
    "logprobs": _count,
    "prompt_logprobs": _count,
}
_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
