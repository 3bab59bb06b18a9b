"""A request's tokens as text, as they arrive."""

from collections.abc import Sequence

from jaxllm.engine.stops import StopMatcher
from jaxllm.engine.vocabulary import Vocabulary


class Detokenizer:
    """Turns one request's output tokens into text, and watches for stop strings.

    The text continues the prompt: `decode(prompt + output)` without `decode(prompt)`, so that a
    sentencepiece model's first word keeps its leading space, and a character that the prompt began and the
    output completes is whole. It is what the `tokenizers` library decodes, with one difference: where
    fallback bytes are not UTF-8, characters decoded before them stay (`tokenizers` takes back the whole run
    of bytes, which a stream cannot).

    No part of a stop string is ever handed out (unless `include_stop_str_in_output`), and neither is part
    of a character: such text is held back until it is known what it is. The cost of a token does not grow
    with the text.

    Args:
        vocabulary: what the tokens say.
        prompt_token_ids: the prompt.
        skip_special_tokens: leave special tokens (as the tokenizer marks them) out of the text.
        spaces_between_special_tokens: if False, an added token right after another is written as it is,
            without a space that the tokenizer's decoder would put before it (byte-level and sentencepiece
            put none).
        stop: strings that end the text.
        include_stop_str_in_output: whether the text ends after the stop string, or before it.
        min_tokens: stop strings that are complete within this many first tokens do not count.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._spaced = skip_special_tokens or spaces_between_special_tokens
        self._stops = StopMatcher(stop) if stop else None
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        # Characters have at most 4 bytes and tokens at least one, so the last 4 tokens tell what is
        # unfinished.
        visible = _last_visible(vocabulary, prompt_token_ids, self._skipped, 4)
        self._unfinished = vocabulary.unfinished(visible)
        self._first = not visible
        self._last_added = bool(visible) and visible[-1] in vocabulary.added_tokens
        self._held = ""
        self._ready: list[str] = []
        """Text that no delta has given out."""
        self._text = ""
        """All text that may be shown, but for `_rest`: joined when it is asked for, and each piece once."""
        self._rest: list[str] = []
        self.num_tokens = 0
        """Output tokens read: all that were given, up to the one that completes a stop string."""
        self.finished = False
        """Whether the text is complete: a stop string was met, or `finish` was called."""

    @property
    def unfinished(self) -> bytes:
        """Bytes of the character that the tokens so far have begun and not finished."""
        return self._unfinished

    @property
    def text(self) -> str:
        """All text that may be shown by now."""
        if self._rest:
            self._text += "".join(self._rest)
            self._rest.clear()
        return self._text

    def update(self, token_ids: Sequence[int], *, stop_token: bool = False) -> str | None:
        """Reads the next output tokens.

        Args:
            token_ids: tokens that follow those of earlier updates.
            stop_token: whether the last of them is a stop token (end of sequence included), whose text is
                left out unless `include_stop_str_in_output`.

        Returns:
            The stop string that these tokens complete, or None. Then the text is finished.

        Raises:
            RuntimeError: the text is finished already.
        """
        if self.finished:
            raise RuntimeError(
                "update() after the text was finished: a request gets no tokens once it has stopped"
            )
        last = len(token_ids) - 1
        for i, token_id in enumerate(token_ids):
            self.num_tokens += 1
            if stop_token and i == last and not self._include_stop:
                break
            stop = self._append(self._decode(token_id))
            if stop is not None:
                return stop
        return None

    def take_delta(self) -> str:
        """The text that may be shown and was not taken before; all deltas together are the final text."""
        delta = "".join(self._ready)
        self._ready.clear()
        return delta

    def finish(self) -> None:
        """Ends the text: what was held back belongs to it after all, an unfinished character as U+FFFD."""
        if self.finished:
            return
        tail, self._unfinished = self._vocabulary.decode_bytes(self._unfinished, final=True)
        self._show(self._held + tail)
        self._held = ""
        self.finished = True

    def _show(self, text: str) -> None:
        self._ready.append(text)
        self._rest.append(text)

    def _decode(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        added = self._vocabulary.added_tokens.get(token_id)
        if not self._spaced and added is not None and self._last_added:
            data = added.encode()
        else:
            data = self._vocabulary.token_bytes(token_id, first=self._first)
        if data is None:
            return ""
        self._first, self._last_added = False, added is not None
        text, self._unfinished = self._vocabulary.decode_bytes(self._unfinished + data, final=False)
        return text

    def _append(self, text: str) -> str | None:
        """Adds text, holds back what may begin a stop string, and cuts it off at one that is complete."""
        if self._stops is None:
            self._show(text)
            return None
        match = self._stops.feed(text, ignore=self.num_tokens <= self._min_tokens)
        text = self._held + (text if match is None else text[: match.end])
        held = 0 if self._include_stop else self._stops.partial if match is None else len(match.stop)
        self._show(text[: len(text) - held])
        self._held = text[len(text) - held :]
        if match is None:
            return None
        self._held, self._unfinished, self.finished = "", b"", True
        return match.stop


def _last_visible(
    vocabulary: Vocabulary, token_ids: Sequence[int], skipped: frozenset[int], count: int
) -> list[int]:
    """The last `count` tokens that write anything, in order."""
    visible: list[int] = []
    for token_id in reversed(token_ids):
        if token_id not in skipped and vocabulary.token_bytes(token_id) is not None:
            visible.append(token_id)
            if len(visible) == count:
                break
    return visible[::-1]
