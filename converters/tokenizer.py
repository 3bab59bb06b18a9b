"""The tokenizer that belongs to a model, wherever that is."""

from pathlib import Path

from converters.advice import transformers
from converters.errors import CheckpointError
from converters.gguf_tokenizer import build_tokenizer
from converters.hub import is_on_disk, locate

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "*.spm")
"""What transformers makes tokenizers from; a folder without any of these has none."""


def load_tokenizer(
    model: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> transformers.PreTrainedTokenizerBase:
    """Loads a tokenizer with its special tokens and chat template.

    Args:
        model: what `open_checkpoint` takes, or `Checkpoint.path`. Of a repo only the tokenizer is downloaded.
        revision, cache_dir, token, local_files_only: as for `open_checkpoint`.
        trust_remote_code: let transformers run the code that a repo or folder ships for its tokenizer.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    name = str(model)
    path = name
    if is_on_disk(name) or ":" in name:
        path = locate(
            name, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
        if path.is_file():
            return build_tokenizer(path)
        if not any(next(path.glob(pattern), None) for pattern in FILES):
            raise CheckpointError(
                f"{path}: has no tokenizer (no {', '.join(FILES[:3])}); name another with tokenizer=..."
            )
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path,
            revision=revision or "main",
            cache_dir=cache_dir,
            token=token,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({reason[0]})") from error
