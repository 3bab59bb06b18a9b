"""A vocabulary in the form that grammars are compiled against."""

from collections.abc import Callable, Collection, Sequence
from functools import cached_property

from llguidance import LLTokenizer


class TokenTable:
    """What each token writes. Making one sorts all tokens into a trie: 0.1 s for 49,152 of them.

    Args:
        tokens: each token's bytes, by id; empty where the tokenizer has none, and no grammar allows those.
        special_ids: tokens that are no text, however they are written.
        eos_ids: end-of-sequence tokens, which are allowed where an output may end.
        encode: the tokenizer, without special tokens at the ends. Where a grammar leaves one way to go on,
            the output has the tokens that this gives.

    Raises:
        ValueError: there is no end-of-sequence token.
    """

    is_tokenizer_wrapper = True  # by this LLTokenizer knows the form; it reads the attributes and calls
    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        *,
        special_ids: Collection[int],
        eos_ids: Collection[int],
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        if not eos_ids:
            raise ValueError("structured_outputs: the model has no end-of-sequence token to end outputs with")
        self.tokens = tokens
        self.eos_ids = frozenset(eos_ids)
        self.eos_token_id = min(eos_ids)
        self.special_token_ids = sorted({*special_ids, *eos_ids})
        self._encode = encode
        self._special = frozenset(self.special_token_ids)
        self.compiled = LLTokenizer(self, n_vocab=len(tokens), eos_token=sorted(eos_ids))  # pyright: ignore[reportArgumentType]

    @property
    def num_words(self) -> int:
        """32-bit words of a mask with a bit for each token."""
        return -(-len(self.tokens) // 32)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that are no text, by their names."""
        return {self.tokens[token].decode(errors="replace"): token for token in self.special_token_ids}

    def __call__(self, text: str) -> list[int]:
        """Tokens that write exactly this text, none of them special.

        A tokenizer may put a space before the text, or take the name of a special token for that token. Then
        it is the longest token that fits, again and again, up to where none does.
        """
        found = list(self._encode(text))
        written = b"".join(self.tokens[token] for token in found)
        if written == text.encode() and self._special.isdisjoint(found):
            return found
        return self._longest(text.encode())

    def _longest(self, data: bytes) -> list[int]:
        ids, found, at = self._ids, [], 0
        while at < len(data):
            lengths = range(min(self._longest_token, len(data) - at), 0, -1)
            fitting = next((ids[piece] for n in lengths if (piece := data[at : at + n]) in ids), None)
            if fitting is None:
                break
            found.append(fitting)
            at += len(self.tokens[fitting])
        return found

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        pairs = reversed(list(enumerate(self.tokens)))  # of equal tokens the first stays
        return {written: token for token, written in pairs if written and token not in self._special}

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._ids), default=0)
