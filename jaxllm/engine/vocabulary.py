"""What each token id says, in bytes: the one place that knows how tokenizers turn ids back into text.

The text of a token sequence is the UTF-8 decoding of its tokens' bytes laid end to end. That holds for
byte-level BPE, for sentencepiece with byte fallback, for Metaspace and for WordPiece, once two things are
known of a token: its bytes in the middle of a text, and its bytes at the very beginning (where
sentencepiece drops its leading space). So decoding needs no window of earlier tokens, and a token costs the
same wherever it stands.
"""

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any

from converters.tokenizer import TextTokenizer

_ANCHOR = "a"  # a token that every supported decoder leaves as it is
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNDECODABLE = re.compile("[\udc80-\udcff]")
_DECODERS = ("ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")


class Vocabulary:
    """The tokens of one tokenizer as bytes. Safe to share between requests and threads.

    Args:
        tokenizer: a transformers tokenizer backed by the `tokenizers` library.

    Raises:
        ValueError: the tokenizer has no `tokenizers` backend, or its decoder does not decode token by token.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__}: text needs one backed by the `tokenizers` library "
                "(with a tokenizer.json); convert it, or pass token ids and detokenize=False"
            )
        self._id_to_token = backend.id_to_token
        self._decoder = backend.decoder
        kinds = _decoder_kinds(self._decoder)
        self._byte_level = kinds == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in kinds
        added: dict[int, Any] = backend.get_added_tokens_decoder()
        self.added_tokens: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self.special_ids: frozenset[int] = frozenset(
            token_id for token_id, token in added.items() if token.special
        )
        self._inner: dict[int, bytes | None] = {}
        # tokenizers writes one U+FFFD for each undecodable byte of fallback tokens, and one for each
        # undecodable sequence of byte-level tokens (as Unicode recommends).
        self._errors = "surrogateescape" if self._byte_fallback else "replace"

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes | None:
        """The bytes a token adds to a text; None for an id that the tokenizer does not have.

        Args:
            token_id: the token.
            first: whether it is the text's first token.
        """
        if first:
            return self._compute(token_id, first=True)
        if token_id not in self._inner:
            self._inner[token_id] = self._compute(token_id, first=False)
        return self._inner[token_id]

    def decode_bytes(self, data: bytes, *, final: bool) -> tuple[str, bytes]:
        """Decodes UTF-8, undecodable bytes as U+FFFD.

        Args:
            data: bytes of a text, from the beginning of a character.
            final: whether the text ends here; if not, an unfinished character at the end is left over.

        Returns:
            The text and the bytes left over (at most 3; none if `final`).
        """
        text, used = codecs.utf_8_decode(data, self._errors, final)
        if self._byte_fallback:
            text = _UNDECODABLE.sub("\ufffd", text)
        return text, data[used:]

    def decode_token(self, token_id: int, unfinished: bytes = b"") -> str:
        """What one token says, for showing it beside its logprob (as vLLM's `Logprob.decoded_token`).

        Args:
            token_id: the token.
            unfinished: bytes of a character that the tokens before it began and this token may complete.

        Returns:
            The token's text; with `unfinished` the whole character if the token completes it; "" if the
            token ends in the middle of a character.
        """
        text, left = self.decode_bytes(unfinished + (self.token_bytes(token_id) or b""), final=False)
        return "" if left else text

    def unfinished(self, token_ids: Iterable[int], unfinished: bytes = b"") -> bytes:
        """The bytes of a character that these tokens have begun and not finished (at most 3).

        Args:
            token_ids: tokens that follow each other.
            unfinished: what the tokens before them had begun.
        """
        for token_id in token_ids:
            _, unfinished = self.decode_bytes(unfinished + (self.token_bytes(token_id) or b""), final=False)
        return unfinished

    def _compute(self, token_id: int, *, first: bool) -> bytes | None:
        token = self._id_to_token(token_id)
        if token is None:
            return None
        if self._byte_level:
            return _byte_level_bytes(token)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            # A stripped leading space may have been written as a byte, too.
            stripped = first and self._decoder.decode([token]) == ""
            return b"" if stripped else bytes([int(match[1], 16)])
        if first:
            return (token if self._decoder is None else self._decoder.decode([token])).encode()
        if self._decoder is None:
            return f" {token}".encode()
        return self._decoder.decode([_ANCHOR, token])[len(_ANCHOR) :].encode()


def _decoder_kinds(decoder: Any) -> list[str]:
    """The kinds of the decoder's parts, in order.

    Raises:
        ValueError: a part whose work on one token depends on the tokens around it.
    """
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [part["type"] for part in parts]
    for part in parts:
        strips_more = part["type"] == "Strip" and (part["start"] > 1 or part["stop"] > 0)
        if kinds != ["ByteLevel"] and (part["type"] not in _DECODERS or strips_more):
            raise ValueError(
                f"tokenizer: its decoder {part} does not decode token by token; those that do are ByteLevel "
                f"alone, or any of {', '.join(_DECODERS)} (Strip of at most one leading character)"
            )
    return kinds


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 is itself, the rest follows from U+0100 on.

    Source: `bytes_to_unicode` in https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_table()


def _byte_level_bytes(token: str) -> bytes:
    """A byte-level token's bytes; one with a character outside the table (an added token) is plain text."""
    try:
        return bytes([_BYTE_LEVEL[character] for character in token])
    except KeyError:
        return token.encode()
