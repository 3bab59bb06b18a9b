"""What the sampler keeps on the device for each row, and how a request's parameters get there.

Every leaf has a leading axis of rows. `RowScalars` are a few numbers, uploaded for every request. `RowTables`
hold what only some requests need; they are uploaded for those alone, and a row's `features` say which of them
are its own: the others may hold what an earlier request left there and are never looked at.
"""

from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, UInt32

from jaxllm.sampling.processors import LogitsProcessor

NO_TOKEN = -1
"""Fills up lists of token ids."""


@dataclass(frozen=True)
class Limits:
    """How much of each list a row has room for; a request that needs more is refused."""

    logit_bias: int = 512
    """Entries of `logit_bias`."""
    stop_ids: int = 128
    """End-of-sequence and stop tokens together, where `min_tokens` is set."""
    bad_words: int = 256
    """Token sequences made from `bad_words`; a word makes up to two."""
    bad_word_tokens: int = 16
    """Tokens in one of these sequences."""


@dataclass(frozen=True)
class SamplerConfig:
    """What the sampler's programs are made for."""

    vocab_size: int
    limits: Limits = Limits()
    processors: tuple[LogitsProcessor, ...] = ()


class Feature(IntFlag):
    """Work that a row asks for besides choosing a token."""

    ALLOWED = 1
    BAD_WORDS = 2
    MIN_TOKENS = 4
    BIAS = 8
    PENALTIES = 16
    COUNTS = 32
    """Count the row's output tokens: penalties and custom processors need them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowScalars:
    """Numbers of a row (numpy, one row) or of all rows (on the device, with an axis of rows)."""

    features: Any
    """uint32, bits of `Feature`."""
    processors: Any
    """uint32, bits of the custom processors."""
    seed: Any
    """uint32[2], high word first."""
    temperature: Any
    """float32; 0: greedy."""
    top_k: Any
    """int32; 0: off."""
    top_p: Any
    """float32; 0: off."""
    min_p: Any
    """float32; 0: off."""
    prompt_length: Any
    """int32, tokens."""
    min_length: Any
    """int32, tokens of prompt and output before stop tokens may be chosen."""
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowTables:
    """Lists and vocabulary-wide tables of a row, or of all rows."""

    bias_ids: Any
    """int32[bias], NO_TOKEN where unused."""
    bias_values: Any
    """float32[bias]."""
    stop_ids: Any
    """int32[stops], NO_TOKEN where unused."""
    bad_words: Any
    """int32[words, length], each aligned right, NO_TOKEN where unused."""
    processor_params: Any
    """float32[params], the parameters of all processors in their order."""
    allowed: Any
    """uint32[vocab / 32], a bit for each token, lowest first."""
    in_prompt: Any
    """uint32[vocab / 32], likewise."""
    output_counts: Any
    """int32[vocab]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSettings:
    """One request's part of the state; `tables` is None for requests that need none of them."""

    scalars: RowScalars
    tables: RowTables | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """All rows' settings, on the device."""

    scalars: RowScalars
    tables: RowTables


def empty_state(config: SamplerConfig, num_rows: int) -> SamplerState:
    """Makes the state of `num_rows` rows, all greedy and with no feature."""
    limits, words = config.limits, -(-config.vocab_size // 32)

    def zeros(dtype: DTypeLike, *shape: int) -> Array:
        return jnp.zeros((num_rows, *shape), dtype)

    scalars = RowScalars(
        features=zeros(jnp.uint32),
        processors=zeros(jnp.uint32),
        seed=zeros(jnp.uint32, 2),
        temperature=zeros(jnp.float32),
        top_k=zeros(jnp.int32),
        top_p=zeros(jnp.float32),
        min_p=zeros(jnp.float32),
        prompt_length=zeros(jnp.int32),
        min_length=zeros(jnp.int32),
        repetition_penalty=zeros(jnp.float32),
        presence_penalty=zeros(jnp.float32),
        frequency_penalty=zeros(jnp.float32),
    )
    tables = RowTables(
        bias_ids=zeros(jnp.int32, limits.logit_bias),
        bias_values=zeros(jnp.float32, limits.logit_bias),
        stop_ids=zeros(jnp.int32, limits.stop_ids),
        bad_words=zeros(jnp.int32, limits.bad_words, limits.bad_word_tokens),
        processor_params=zeros(jnp.float32, sum(len(p.parameters) for p in config.processors)),
        allowed=zeros(jnp.uint32, words),
        in_prompt=zeros(jnp.uint32, words),
        output_counts=zeros(jnp.int32, config.vocab_size),
    )
    return SamplerState(scalars, tables)


def load_row(state: SamplerState, row: Int[Array, ""], settings: RowSettings) -> SamplerState:
    """Gives a row its request's settings.

    To be jitted with `state` donated: one program for settings with tables, one for those without.
    """
    # The second index is out of range and dropped: a scatter of one row would become a dynamic-update-slice,
    # which XLA on CPU does not always do in place; a scatter of two always is.
    rows = jnp.stack([row, jnp.int32(state.scalars.features.shape[0])])

    def put(leaves: Array, leaf: Array) -> Array:
        return leaves.at[rows].set(jnp.broadcast_to(leaf, (2, *leaf.shape)), mode="drop")

    scalars = jax.tree.map(put, state.scalars, settings.scalars)
    tables = state.tables if settings.tables is None else jax.tree.map(put, state.tables, settings.tables)
    return SamplerState(scalars, tables)


def unpack_bits(words: UInt32[Array, "seqs words"], vocab_size: int) -> Bool[Array, "seqs vocab"]:
    """Unpacks uint32 words into a mask, the lowest bit first."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
    return bits.reshape(words.shape[0], -1)[:, :vocab_size] != 0
