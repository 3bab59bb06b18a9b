"""Filling in the middle: a prompt from the text before and the text after, in the form that a model knows.

Which form that is shows in the tokens that its tokenizer has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from jaxllm.engine.inputs import Prompt
from jaxllm.server.errors import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHOR = "☺"
"""Before a text, for tokenizers that would put a space there: https://github.com/meta-llama/codellama"""

_BAR = "\uff5c"  # a bar as wide as a Chinese character


@dataclass(frozen=True)
class Form:
    """How a family of models is asked.

    Attributes:
        tokens: what stands before the prefix, before the suffix, and at the end.
        ends: tokens that end the middle besides the end of sequence.
        joined: whether the suffix goes on without the space that the tokenizer would put before it.
    """

    tokens: tuple[str, str, str]
    ends: tuple[str, ...] = ()
    joined: bool = False


FORMS = (
    # Qwen2.5-Coder, https://arxiv.org/abs/2409.12186; CodeGemma, https://arxiv.org/abs/2406.11409
    Form(
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ends=("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    # StarCoder and StarCoder2, https://arxiv.org/abs/2305.06161; Granite Code, https://arxiv.org/abs/2405.04324
    Form(("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), ends=("<|endoftext|>", "<file_sep>")),
    # DeepSeek-Coder, https://arxiv.org/abs/2401.14196
    Form(
        (f"<{_BAR}fim▁begin{_BAR}>", f"<{_BAR}fim▁hole{_BAR}>", f"<{_BAR}fim▁end{_BAR}>"), ends=("<|EOT|>",)
    ),
    # Code Llama, https://arxiv.org/abs/2308.12950
    Form(("▁<PRE>", "▁<SUF>", "▁<MID>"), ends=("▁<EOT>",), joined=True),
)


class Infilling:
    """Makes prompts for one tokenizer.

    Raises:
        ApiError: 400, the tokenizer knows none of the forms.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        known: Mapping[str, int] = tokenizer.get_vocab()
        form = next((form for form in FORMS if all(token in known for token in form.tokens)), None)
        if form is None:
            text = "suffix: this model cannot fill in the middle; put all of the text into the prompt"
            raise ApiError(400, text, param="suffix", code="unsupported_by_model")
        self._tokenizer, self._form = tokenizer, form
        self._ids = [known[token] for token in form.tokens]
        self.stop_token_ids = [known[token] for token in form.ends if token in known]
        """Tokens that end the middle."""
        self._before = self._encode("", special=True)
        """What the tokenizer begins every text with."""

    def prompts(self, prompts: Sequence[Prompt], suffix: str, *, special: bool = True) -> list[Prompt]:
        """The prompts, each a text with the suffix added.

        Args:
            special: whether they begin with what the tokenizer begins every text with.

        Raises:
            ValueError: a text that is no Unicode; the message begins with the parameter.
        """
        _check_unicode("suffix", suffix)
        after = self._encode(suffix, joined=self._form.joined)
        before = self._before if special else []
        return [self._prompt(dict(cast(Any, prompt)), before, after) for prompt in prompts]

    def _prompt(self, given: dict[str, Any], before: list[int], after: list[int]) -> Prompt:
        text = given.pop("prompt")
        _check_unicode("prompt", text)
        begin, hole, end = self._ids
        ids = [*before, begin, *self._encode(text), hole, *after, end]
        return cast(Prompt, given | {"prompt_token_ids": ids})

    def _encode(self, text: str, *, special: bool = False, joined: bool = False) -> list[int]:
        if not joined:
            return cast(list[int], self._tokenizer.encode(text, add_special_tokens=special))
        anchor = cast(list[int], self._tokenizer.encode(ANCHOR, add_special_tokens=False))
        return cast(list[int], self._tokenizer.encode(ANCHOR + text, add_special_tokens=False))[len(anchor) :]


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: not valid Unicode text: {error}") from error
