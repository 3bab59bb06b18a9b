"""A tokenizer without transformers, whose import takes longer than all else that a start does in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class BareTokenizer:
    """What the `tokenizers` library does, under the names that transformers has for it.

    Attributes:
        backend_tokenizer: text to ids and back.
        special: tokens by transformers' names for them, such as `eos_token`.
        chat_template: one template, or several by name.
    """

    backend_tokenizer: Tokenizer
    special: Mapping[str, str]
    chat_template: str | dict[str, str] | None

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if the model names one."""
        token = self.special.get("eos_token")
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, **options: Any) -> str:
        """The text of ids; `options` are those of transformers."""
        return str(self.full.decode(token_ids, skip_special_tokens=skip_special_tokens, **options))

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """As transformers does it."""
        return self.full.apply_chat_template(list(conversation), **options)  # pyright: ignore[reportArgumentType]

    @cached_property
    def full(self) -> "PreTrainedTokenizerFast":
        """transformers' own tokenizer around this one, imported and made when it is first asked for."""
        from converters.advice import transformers

        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=self.backend_tokenizer,
            chat_template=self.chat_template,
            clean_up_tokenization_spaces=False,
            **self.special,
        )
