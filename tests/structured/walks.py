"""Outputs that are drawn at random from what a grammar allows, without a model."""

import random
from collections.abc import Callable
from functools import partial

import numpy as np

from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.structured import StructuredOutputsParams
from jaxllm.structured.grammar import Grammar
from jaxllm.structured.matcher import Matcher
from jaxllm.structured.tokens import TokenTable


def make_table(tokenizer, eos: set[int], size: int | None = None) -> TokenTable:
    """The table of a tokenizer, as the engine makes it; tokens past its own write nothing."""
    vocabulary = Vocabulary(tokenizer)
    return TokenTable(
        [vocabulary.token_bytes(token) or b"" for token in range(size or len(tokenizer))],
        special_ids=vocabulary.special_ids,
        eos_ids=eos,
        encode=partial(tokenizer.encode, add_special_tokens=False),
    )


def allowed(matcher: Matcher) -> list[int]:
    """The tokens that may come next."""
    bits = np.unpackbits(matcher.compute_mask().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def written(table: TokenTable, tokens: list[int]) -> str:
    """The text of tokens."""
    return b"".join(table.tokens[token] for token in tokens).decode()


def walk(grammar: Grammar, seed: int, most: int = 400) -> list[int]:
    """The tokens of an output to its end, without the end-of-sequence token.

    Raises:
        AssertionError: it does not end.
    """
    rng, matcher, tokens = random.Random(seed), grammar.matcher(), []
    while not matcher.is_complete:
        assert len(tokens) < most, "the output does not end"
        token = rng.choice(allowed(matcher))
        matcher.accept(token)
        if token not in grammar.tokens.eos_ids:
            tokens.append(token)
    return tokens


def grammar_of(table: TokenTable) -> Callable[..., Grammar]:
    """Makes grammars for a table from the fields of `StructuredOutputsParams`."""
    return lambda **constraint: Grammar(table, StructuredOutputsParams(**constraint))
