"""How far one output has come in its grammar, and what it may go on with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32
from llguidance import LLExecutor, LLMatcher

if TYPE_CHECKING:
    from jaxllm.structured.grammar import Grammar


class Matcher:
    """Follows an output token by token. Made by `Grammar.matcher`."""

    def __init__(self, grammar: "Grammar", compiled: LLMatcher) -> None:
        self.grammar = grammar
        self._compiled = compiled
        self._state = compiled.deep_copy()
        self._accepted: list[int] = []

    @property
    def is_complete(self) -> bool:
        """Whether the output fits the grammar and nothing can follow."""
        return self._state.is_stopped() and not self._state.is_error()

    def accept(self, token: int) -> None:
        """Goes on by a token.

        Raises:
            ValueError: the grammar does not allow it here, or has become too complex.
        """
        if not self._state.consume_token(token):
            self._renew()
            if not self._state.consume_token(token):
                raise self._error(f"token {token} was chosen, which is not allowed here")
        self._accepted.append(token)

    def compute_mask(self) -> Int32[np.ndarray, " words"]:
        """Which tokens may come next: a bit for each, the lowest first.

        Raises:
            ValueError: none may, or the grammar has become too complex.
        """
        mask = np.zeros(self.grammar.tokens.num_words, np.int32)
        self._state.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._state.is_error():
            self._compute_again(mask)
        return mask

    def _compute_again(self, mask: Int32[np.ndarray, " words"]) -> None:
        self._renew()
        self._state.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._state.is_error():
            raise self._error("nothing can follow what has been written")

    def _renew(self) -> None:
        """Begins anew with a lexer that holds nothing of other outputs, and goes on to where it was."""
        self._compiled = self.grammar.renew(self._compiled)
        self._state = self._compiled.deep_copy()
        self._state.consume_tokens(self._accepted)

    def _error(self, what: str) -> ValueError:
        lines = self._state.get_error().splitlines()
        reason = f" ({lines[0]})" if lines else ""
        return self.grammar.error(f"{what}{reason}")


def compute_masks(
    matchers: Sequence[Matcher], masks: Int32[np.ndarray, "rows words"], threads: LLExecutor
) -> dict[int, ValueError]:
    """Fills the first rows with the masks of the matchers, in their order. Other threads may run meanwhile.

    Args:
        masks: contiguous.
        threads: to share the work between.

    Returns:
        Errors by the index of the matcher, for those that cannot go on; their masks mean nothing.
    """
    row_bytes = masks.shape[1] * masks.itemsize
    pairs = [(matcher._state, row) for row, matcher in enumerate(matchers)]
    threads.unsafe_compute_mask_ptr(pairs, masks.ctypes.data, row_bytes, len(masks))
    failed = {}
    for row, matcher in enumerate(matchers):
        if matcher._state.is_error():  # its mask would end the output as if it were complete
            try:
                matcher._compute_again(masks[row])
            except ValueError as error:
                failed[row] = error
    return failed
