"""The tokenizer that belongs to a model, wherever that is."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converters.bare_tokenizer import BareTokenizer
from converters.errors import CheckpointError
from converters.on_disk import find_on_disk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "*.spm")
"""What transformers makes tokenizers from; a folder without any of these has none."""


class TextTokenizer(Protocol):
    """What the engine needs of a tokenizer: transformers' have it, and so has a `BareTokenizer`."""

    @property
    def eos_token_id(self) -> Any: ...

    @property
    def chat_template(self) -> Any: ...

    def encode(self, text: Any, *, add_special_tokens: bool = True) -> Any: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False, **options: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def load_tokenizer(model: str | Path, **where: Any) -> "PreTrainedTokenizerBase":
    """Loads a tokenizer as transformers has it; arguments and errors are those of `open_tokenizer`."""
    return full_tokenizer(open_tokenizer(model, **where))


def full_tokenizer(tokenizer: TextTokenizer) -> "PreTrainedTokenizerBase":
    """The tokenizer as transformers has it."""
    return tokenizer.full if isinstance(tokenizer, BareTokenizer) else tokenizer  # pyright: ignore[reportReturnType]


def longest_token(tokenizer: "TextTokenizer | PreTrainedTokenizerBase") -> int:
    """Characters of the longest token: a text of `n` tokens has at most so many times `n`.

    A text may have more where the tokenizer takes something away before it begins, such as repeated spaces.
    """
    vocabulary = getattr(tokenizer, "backend_tokenizer", tokenizer).get_vocab()  # pyright: ignore[reportAttributeAccessIssue]
    return max(map(len, vocabulary), default=1)


def open_tokenizer(
    model: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> TextTokenizer:
    """Loads a tokenizer with its special tokens and chat template. That of a GGUF file needs no transformers.

    Args:
        model: what `open_checkpoint` takes, or `Checkpoint.path`. Of a repo only the tokenizer is downloaded.
        revision, cache_dir, token, local_files_only: as for `open_checkpoint`.
        trust_remote_code: let transformers run the code that a repo or folder ships for its tokenizer.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    name = str(model)
    path = find_on_disk(name)
    if path is None and ":" in name:
        from converters.hub import locate

        path = locate(
            name, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
    if path is not None:
        if path.is_file():
            from converters.gguf_tokenizer import build_tokenizer

            return build_tokenizer(path)
        if not any(next(path.glob(pattern), None) for pattern in FILES):
            raise CheckpointError(
                f"{path}: has no tokenizer (no {', '.join(FILES[:3])}); name another with tokenizer=..."
            )
    from converters.advice import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            path or name,
            revision=revision or "main",
            cache_dir=cache_dir,
            token=token,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path or name}: its tokenizer cannot be loaded ({reason[0]})") from error
