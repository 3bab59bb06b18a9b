"""Small tokenizers of the kinds that models come with, made on the spot."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_BYTES = pre_tokenizers.ByteLevel.alphabet()
_WORDS = ["▁the", "▁a", "▁", "▁▁", "cat", "s", "▁cats", "é", "▁日本", ".", "end", "\n", "User", ":", "▁User"]
_CHARACTERS = ["a", "b", "c", "t", "h", "e", "▁"]


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3, Qwen: tokens are bytes, so any of them may end inside a character."""
    merged = ["User", "Ġthe", "cat", "ĊĊ", "Ã©", "æĹ", "¥æ", "ľ¬", "Ġæ", "ðŁ", "ĺĢ", "ab", "bc", "abc"]
    tokens = sorted(_BYTES) + merged
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, bos_by_default=False)


def byte_fallback(*, strips: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral (`strips`: a text's leading space is not written) or Gemma."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + sorted({*_WORDS, *_CHARACTERS})
    vocab = {"<unk>": 0} | {token: i for i, token in enumerate(tokens, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replaced = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if strips else replaced
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strips else parts)
    return _finish(tokenizer, bos_by_default=True)


def metaspace() -> PreTrainedTokenizerFast:
    """As T5 and XLM-R: sentencepiece Unigram without bytes."""
    pieces = ["<unk>", *dict.fromkeys(_WORDS + _CHARACTERS)]
    vocab = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _finish(tokenizer, bos_by_default=False)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: words with spaces between them, punctuation without."""
    tokens = ["[UNK]", "the", "cat", "##s", ".", "do", "n't", "'s", "user", "##ab", "?"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return _finish(tokenizer, bos_by_default=False)


def words() -> PreTrainedTokenizerFast:
    """A vocabulary of words and no decoder at all: words are joined by spaces."""
    tokens = ["<unk>", "one", "two", "three", "four", "stop"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _finish(tokenizer, bos_by_default=False)


ALL = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, no strip": lambda: byte_fallback(strips=False),
    "metaspace": metaspace,
    "word piece": word_piece,
    "words": words,
}


def _finish(tokenizer: Tokenizer, *, bos_by_default: bool) -> PreTrainedTokenizerFast:
    """Adds special tokens, an added token that is not special, and one whose characters no decoder knows."""
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("é <x>", normalized=False)])
    if bos_by_default:
        bos = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
