"""A tokenizer from a GGUF file's metadata, built of the parts that the `tokenizers` library has.

A GGUF holds a vocabulary and the name of the pre-tokenizer it was trained with (`tokenizer.ggml.pre`).
Sources: llama.cpp's src/llama-vocab.cpp for what those names mean, and the `tokenizer.json` files of the
models that have them for what they are made of. transformers can read GGUF too, but wants torch for it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from converters.bare_tokenizer import BareTokenizer
from converters.errors import CheckpointError
from converters.gguf_file import GGUFFile

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_TAIL}"
_GPT4O = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
    rf"\p{{N}}{{1,3}}|{_CASED_TAIL}"
)
_GPT2 = ""
"""ByteLevel's own expression."""

SPLITS: Mapping[str, str] = {
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    "gpt-4o": _GPT4O,
}
"""How text is cut into words before merging, by `tokenizer.ggml.pre`."""
SINGLE_DIGITS = frozenset({"smollm"})
"""Where digits are cut off one by one first."""
COMPOSED = frozenset({"qwen2", "deepseek-r1-qwen"})
"""Where text is brought to Unicode's composed form (NFC) first."""
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
"""Where a word that is in the vocabulary is taken as it is, whatever the merges would make of it."""
GEMMA = frozenset({"gemma", "gemma2", "gemma3"})


def build_tokenizer(path: Path) -> BareTokenizer:
    """The tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
        CheckpointError: the file has no tokenizer, one of a kind that is not read, or a damaged one.
    """
    vocabulary = _Vocabulary(GGUFFile(path))
    kind = vocabulary.get("model", str)
    if kind not in ("gpt2", "llama"):
        problem = (
            "has no tokenizer" if kind is None else f"has a tokenizer of kind {kind!r}, which is not read"
        )
        raise CheckpointError(f"{path}: {problem}; name another with tokenizer=...")
    build = _byte_level if kind == "gpt2" else _sentencepiece
    try:
        tokenizer = build(vocabulary)
        _add_special_tokens(tokenizer, vocabulary)
        tokenizer.post_processor = _post_processor(vocabulary, begins=kind == "llama")
    except CheckpointError:
        raise
    except (
        Exception
    ) as error:  # the library raises plain Exception for vocabularies that contradict themselves
        raise CheckpointError(
            f"{path}: its tokenizer is damaged ({error}); download the file again"
        ) from error
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: vocabulary.special(key) for name, key in names.items()}
    special = {name: token for name, token in special.items() if token is not None}
    return BareTokenizer(tokenizer, special, vocabulary.chat_template())


class _Vocabulary:
    """The file's `tokenizer.*` keys, with their types checked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture"))
        self.tokens = self.list("tokens", str) or []
        kinds = self.list("token_type", int)
        if kinds is not None and len(kinds) != len(self.tokens):
            raise CheckpointError(f"{file.path}: has {len(self.tokens)} tokens but {len(kinds)} token types")
        self.kinds = kinds or [TokenType.NORMAL] * len(self.tokens)
        # The first of equals counts, so that every token keeps its id.
        self.ids = {token: index for index, token in reversed(list(enumerate(self.tokens)))}

    def get(self, key: str, kind: type, prefix: str = "tokenizer.ggml.") -> Any:
        value = self.file.metadata.get(prefix + key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(
                f"{self.file.path}: {prefix}{key} is a {type(value).__name__}, which it should not be"
            )
        return value

    def list(self, key: str, kind: type) -> list[Any] | None:
        values = self.get(key, list)
        if values is not None and not all(type(value) is kind for value in values):
            raise CheckpointError(
                f"{self.file.path}: tokenizer.ggml.{key} holds something other than {kind.__name__}"
            )
        return values

    def special(self, key: str) -> str | None:
        index = self.get(f"{key}_token_id", int)
        if index is not None and not 0 <= index < len(self.tokens):
            raise CheckpointError(
                f"{self.file.path}: tokenizer.ggml.{key}_token_id={index} of {len(self.tokens)} tokens"
            )
        return None if index is None else self.tokens[index]

    def chat_template(self) -> str | dict[str, str] | None:
        default = self.get("chat_template", str, "tokenizer.")
        names = self.get("chat_templates", list, "tokenizer.") or []
        named = {str(name): self.get(f"chat_template.{name}", str, "tokenizer.") for name in names}
        if not named:
            return default
        return {name: text for name, text in {"default": default, **named}.items() if text is not None}

    def merges(self) -> "list[tuple[str, str]] | None":
        lines = self.list("merges", str)
        pairs = None if lines is None else [tuple(line.split(" ")) for line in lines]
        if pairs is not None and any(len(pair) != 2 for pair in pairs):
            raise CheckpointError(
                f"{self.file.path}: tokenizer.ggml.merges holds a line that is not two tokens"
            )
        return pairs  # pyright: ignore[reportReturnType]


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    """GPT-2's way: bytes written as letters, words cut by an expression, merges from the file."""
    pre = vocabulary.get("pre", str)
    merges = vocabulary.merges()
    if pre not in SPLITS:
        raise CheckpointError(
            f"{vocabulary.file.path}: tokenizer.ggml.pre={pre!r} is not one of {', '.join(SPLITS)}; "
            "name the model's own tokenizer with tokenizer=..."
        )
    if merges is None:
        raise CheckpointError(
            f"{vocabulary.file.path}: has no tokenizer.ggml.merges; name another with tokenizer=..."
        )
    tokenizer = Tokenizer(BPE(vocabulary.ids, merges, ignore_merges=pre in WHOLE_WORDS))
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre in SINGLE_DIGITS else []
    if SPLITS[pre]:
        steps.append(pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not SPLITS[pre]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """Llama 2's and Gemma's way: spaces written as ▁, no words, bytes for what the vocabulary lacks."""
    tokens, scores = vocabulary.tokens, vocabulary.list("scores", float)
    if vocabulary.architecture in GEMMA:
        # Runs of spaces are stored as such, and scores do not follow the order of merging, but ids do.
        tokens = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
        scores = [-float(index) for index in range(len(tokens))]
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{vocabulary.file.path}: has {len(tokens)} tokens, but not as many scores")
    ids = {token: index for index, token in reversed(list(enumerate(tokens)))}
    merges = vocabulary.merges() or _merges_of(ids, scores)
    unknown = vocabulary.special("unknown")
    tokenizer = Tokenizer(BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = vocabulary.get("add_space_prefix", bool)
    spaces: list[Any] = [normalizers.Prepend("▁")] if prefixed is not False else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaces:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _merges_of(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary implies: every way to cut a piece in two, the best first."""
    merges = []
    for piece, index in ids.items():
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += [(-scores[index], index, ids[left], ids[right], left, right) for left, right in known]
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens are special; user-defined ones only stay whole."""
    control, plain = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN) and token:
            control.append(AddedToken(token, normalized=False, special=True))
        elif kind == TokenType.USER_DEFINED and token:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(plain)


def _post_processor(vocabulary: _Vocabulary, *, begins: bool) -> Any:
    """Adds the tokens that begin and end a text, where the file says so. llama.cpp's default: `begins`."""
    add_bos, add_eos = vocabulary.get("add_bos_token", bool), vocabulary.get("add_eos_token", bool)
    bos, eos = vocabulary.special("bos"), vocabulary.special("eos")
    first = [bos] if bos is not None and (begins if add_bos is None else add_bos) else []
    last = [eos] if eos is not None and add_eos else []
    single = [*first, "$A", *last]
    pair = [*single, *(f"{part}:1" for part in (*first, "$B", *last))]
    special = [(token, vocabulary.ids[token]) for token in dict.fromkeys([*first, *last])]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
