"""Holds outputs to their grammars, and says what that means for the rest of what a request asks."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt32
from llguidance import LLExecutor

from jaxllm.engine.inputs import EngineInput
from jaxllm.sampling.settings import pack_bits
from jaxllm.structured.matcher import Matcher, compute_masks


class Constraint:
    """One output and its grammar.

    The grammar comes first: tokens that `min_tokens` or `ignore_eos` hold back may come where nothing else
    can, and the output ends once nothing can follow.

    Args:
        input: with a grammar.
        vocab_size: tokens that the model knows.

    Attributes:
        error: why the output cannot go on, if it cannot.
    """

    def __init__(self, input: EngineInput, vocab_size: int) -> None:
        assert input.grammar is not None
        self.error: ValueError | None = None
        self.matcher: Matcher = input.grammar.matcher()
        params, ends = input.params, input.grammar.tokens.eos_ids
        self._num_tokens = 0
        self._eos_ids = ends
        self._min_tokens = params.min_tokens
        self._ends = np.array(sorted(ends | input.stop_token_ids), np.int64)
        self._without_eos = np.array(sorted(ends if params.ignore_eos else ()), np.int64)
        allowed = params.allowed_token_ids
        self._allowed = (
            None if allowed is None else pack_bits([*allowed, *ends], vocab_size, "allowed_token_ids")
        )

    @property
    def is_complete(self) -> bool:
        """Whether the output has to end here."""
        return self.matcher.is_complete

    @property
    def goes_on(self) -> bool:
        """Whether a token may follow."""
        return self.error is None and not self.is_complete

    def ends_with(self, token: int) -> bool:
        """Whether a token only says that the output ends."""
        return token in self._eos_ids

    def accept(self, tokens: Sequence[int]) -> None:
        """Goes on by some tokens; sets `error` if that is not possible."""
        self._num_tokens += len(tokens)
        try:
            for token in tokens:
                self.matcher.accept(token)
        except ValueError as error:
            self.error = error

    def narrow(self, mask: UInt32[np.ndarray, " words"]) -> None:
        """Takes out of a mask what the request does not want besides; sets `error` if that leaves nothing."""
        _forbid(mask, self._ends if self._num_tokens < self._min_tokens else self._without_eos)
        if self._allowed is not None:
            mask &= self._allowed
            if not mask.any():
                self.error = ValueError("allowed_token_ids: has none of the tokens that the grammar needs")


class Masks:
    """Computes the masks of a step's rows; its threads share that work."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._threads: LLExecutor | None = None

    def compute(self, constraints: Sequence[Constraint]) -> UInt32[np.ndarray, "rows words"]:
        """A mask for each; one that cannot go on has its `error` set, and its mask means nothing."""
        if self._threads is None:
            self._threads = LLExecutor()
        masks = np.zeros((len(constraints), self._num_words), np.int32)
        failed = compute_masks([constraint.matcher for constraint in constraints], masks, self._threads)
        words = masks.view(np.uint32)
        for row, constraint in enumerate(constraints):
            constraint.error = failed.get(row)
            if constraint.error is None:
                constraint.narrow(words[row])
        return words


def _forbid(mask: UInt32[np.ndarray, " words"], tokens: np.ndarray) -> None:
    """Takes tokens out of a mask, unless that would leave none."""
    if not tokens.size:
        return
    left = mask.copy()
    np.bitwise_and.at(left, tokens // 32, ~(np.uint32(1) << (tokens % 32).astype(np.uint32)))
    if left.any():
        mask[:] = left
