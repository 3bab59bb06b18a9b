"""Chooses the next token of each row of a step, on the device.

The order is vLLM's: allowed tokens, bad words, min_tokens, logit_bias, custom processors, penalties; then
temperature, min_p, top_k and top_p for rows that sample. Work that no row of the step asks for is skipped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxllm.sampling.blocks import reduce_blocks, take_blocks
from jaxllm.sampling.filters import filter_weights
from jaxllm.sampling.penalties import (
    add_bias,
    apply_penalties,
    count_tokens,
    forbid_bad_words,
    forbid_stops,
    gather_rows,
    keep_allowed,
)
from jaxllm.sampling.processors import LogitsProcessor
from jaxllm.sampling.state import Feature, RowScalars, RowTables, SamplerState

_BLOCK = 128
_CPU_GROUP = 4
"""Rows worked on at a time on CPU, so that what is computed of them stays in the cache: 4 rows of 49,152 are
0.8 MB. Whole batches would write tens of megabytes in each step, and page faults alone would take 4 ms."""
_EDITS = Feature.ALLOWED | Feature.BAD_WORDS | Feature.MIN_TOKENS | Feature.BIAS | Feature.PENALTIES


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Rows:
    """Some rows of a step: the arguments of `sample`, with an axis of groups in front while mapped over."""

    logits: Any
    scalars: RowScalars
    rows: Any
    lengths: Any
    recent: Any


def sample(
    logits: Float[Array, "seqs vocab"],
    state: SamplerState,
    rows: Int[Array, "seqs"],
    lengths: Int[Array, "seqs"],
    recent: Int[Array, "seqs window"],
    *,
    processors: tuple[LogitsProcessor, ...] = (),
) -> tuple[Int[Array, "seqs"], SamplerState]:
    """Chooses a token for each row and counts it in the state.

    To be traced into the step's program, with `state` donated and at least 2 rows (the smallest bucket).

    Args:
        rows: the state's row of each; the state's number of rows for padding and for those that are not to
            sample in this step: their tokens mean nothing and nothing is counted.
        lengths: tokens known so far, prompt and output: the position of the new token.
        recent: the last known tokens, oldest first, at least `limits.bad_word_tokens - 1` of them; what is
            before a row's first token does not matter.
        processors: those the state was made with.

    Returns:
        The tokens, and the state to use from here on.
    """
    scalars = jax.tree.map(lambda leaves: gather_rows(leaves, rows), state.scalars)
    batch = _Rows(logits, scalars, rows, lengths, recent)

    def choose(batch: _Rows) -> Array:
        edited = _edited(batch)
        logits = _where_any(edited, batch.logits, lambda _: _edit(batch, state.tables, processors))
        return _choose(logits, batch)

    tokens = lax.cond(
        jnp.any(_edited(batch) | (scalars.temperature > 0)),
        lambda: lax.platform_dependent(batch, cpu=lambda batch: _map_groups(choose, batch), default=choose),
        lambda: _argmax(logits),
    )
    counts = count_tokens(state.tables.output_counts, rows, tokens, _has(scalars, Feature.COUNTS))
    return tokens, replace(state, tables=replace(state.tables, output_counts=counts))


def _map_groups(choose: Callable[[_Rows], Array], batch: _Rows) -> Int[Array, "seqs"]:
    """Chooses for a few rows at a time."""
    seqs = batch.rows.shape[0]
    size = math.gcd(seqs, _CPU_GROUP)
    groups = jax.tree.map(lambda leaf: leaf.reshape(seqs // size, size, *leaf.shape[1:]), batch)
    return lax.map(choose, groups).reshape(seqs)


def _edited(batch: _Rows) -> Bool[Array, "seqs"]:
    return _has(batch.scalars, _EDITS) | (batch.scalars.processors != 0)


def _edit(
    batch: _Rows, tables: RowTables, processors: tuple[LogitsProcessor, ...]
) -> Float[Array, "seqs vocab"]:
    """Applies everything that changes logits, to the rows that ask for it."""
    logits, scalars, rows = batch.logits, batch.scalars, batch.rows
    allowed, bias = _has(scalars, Feature.ALLOWED), _has(scalars, Feature.BIAS)
    bad_words, penalized = _has(scalars, Feature.BAD_WORDS), _has(scalars, Feature.PENALTIES)
    too_short = _has(scalars, Feature.MIN_TOKENS) & (batch.lengths < scalars.min_length)
    num_outputs = batch.lengths - scalars.prompt_length

    logits = _where_any(allowed, logits, lambda x: keep_allowed(x, tables, rows, allowed))
    logits = _where_any(
        bad_words, logits, lambda x: forbid_bad_words(x, tables, rows, bad_words, batch.recent, num_outputs)
    )
    logits = _where_any(too_short, logits, lambda x: forbid_stops(x, tables, rows, too_short))
    logits = _where_any(bias, logits, lambda x: add_bias(x, tables, rows, bias))
    for index, processor in enumerate(processors):
        selected = (scalars.processors >> jnp.uint32(index)) & jnp.uint32(1) != 0
        first = sum(len(earlier.parameters) for earlier in processors[:index])
        apply = partial(_process, processor, first, tables, rows, selected)
        logits = _where_any(selected, logits, apply)
    return _where_any(penalized, logits, lambda x: apply_penalties(x, scalars, tables, rows, penalized))


def _process(
    processor: LogitsProcessor,
    first: int,
    tables: RowTables,
    rows: Int[Array, "seqs"],
    selected: Bool[Array, "seqs"],
    logits: Float[Array, "seqs vocab"],
) -> Float[Array, "seqs vocab"]:
    """Applies a custom processor, whose parameters begin at column `first`, to the rows that selected it."""
    columns = gather_rows(tables.processor_params, rows)[:, first : first + len(processor.parameters)]
    params = dict(zip(processor.parameters, columns.T, strict=True))
    processed = processor.function(logits, gather_rows(tables.output_counts, rows), params)
    if processed.shape != logits.shape:
        raise ValueError(
            f"logits processor {processor.name!r} returned shape {processed.shape}: must be {logits.shape}"
        )
    return jnp.where(selected[:, None], processed.astype(logits.dtype), logits)


def _choose(logits: Float[Array, "seqs vocab"], batch: _Rows) -> Int[Array, "seqs"]:
    """The likeliest token of greedy rows, a drawn one of the others."""
    greedy = batch.scalars.temperature == 0
    likeliest = _argmax(logits)
    return lax.cond(
        jnp.all(greedy),
        lambda: likeliest,
        lambda: jnp.where(greedy, likeliest, _draw(logits, batch.scalars, batch.lengths)),
    )


def _draw(
    logits: Float[Array, "seqs vocab"], scalars: RowScalars, lengths: Int[Array, "seqs"]
) -> Int[Array, "seqs"]:
    temperature = jnp.where(scalars.temperature == 0, 1.0, scalars.temperature)
    largest = jnp.max(logits, axis=1, keepdims=True)
    # the likeliest weighs exactly 1, also where it is infinite
    distance = jnp.where(logits == largest, 0.0, logits - largest)
    weights = jnp.exp(distance / temperature[:, None])
    uniforms = _uniforms(scalars.seed, lengths)
    filtered = (scalars.top_k > 0) | (scalars.top_p > 0) | (scalars.min_p > 0)
    weights = _where_any(filtered, weights, lambda weights: filter_weights(weights, scalars))
    return _draw_by_weight(weights, uniforms)


def _uniforms(seeds: UInt32[Array, "seqs 2"], positions: Int[Array, "seqs"]) -> Float[Array, "seqs 2"]:
    """Two numbers in [0, 1) that depend on a row's seed and position alone."""

    def draw(seed: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        # the folded key is 64 random bits already, and nothing else is drawn with it
        return jax.random.key_data(jax.random.fold_in(key, position))

    # 24 bits are what a float32 below 1 holds exactly
    return (jax.vmap(draw)(seeds, positions) >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2**-24)


def _draw_by_weight(
    weights: Float[Array, "seqs vocab"], uniforms: Float[Array, "seqs 2"]
) -> Int[Array, "seqs"]:
    """Draws by the inverse of the cumulative weights: first a block of tokens, then a token in it.

    Gumbel noise would take a number for each token of the vocabulary: 50 ms for 32 rows of 49,152 on CPU,
    against 2 for this.
    """
    block = _invert(reduce_blocks(weights, _BLOCK, jnp.sum), uniforms[:, 0])
    return block * _BLOCK + _invert(take_blocks(weights, block[:, None], _BLOCK, fill=0.0), uniforms[:, 1])


def _invert(weights: Float[Array, "seqs n"], uniform: Float[Array, "seqs"]) -> Int[Array, "seqs"]:
    """The first index whose cumulative weight passes uniform * total, never one of weight 0."""
    cumulative = jnp.cumsum(weights, axis=1)
    passed = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (weights > 0)
    # uniform * total may round up to the total: then the last one that weighs anything
    last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=1)
    return jnp.where(jnp.any(passed, axis=1), jnp.argmax(passed, axis=1), last).astype(jnp.int32)


def _argmax(logits: Float[Array, "seqs vocab"]) -> Int[Array, "seqs"]:
    """The first of the likeliest tokens."""
    block = jnp.argmax(reduce_blocks(logits, _BLOCK, jnp.max), axis=1).astype(jnp.int32)
    within = jnp.argmax(take_blocks(logits, block[:, None], _BLOCK, fill=-jnp.inf), axis=1)
    return block * _BLOCK + within.astype(jnp.int32)


def _has(scalars: RowScalars, feature: Feature) -> Bool[Array, "seqs"]:
    return (scalars.features & jnp.uint32(feature)) != 0


def _where_any(
    wanted: Bool[Array, "seqs"], logits: Float[Array, "seqs vocab"], change: Callable[[Array], Array]
) -> Float[Array, "seqs vocab"]:
    return lax.cond(jnp.any(wanted), change, lambda unchanged: unchanged, logits)
