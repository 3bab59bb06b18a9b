"""What changes the logits before a token is chosen: masks, biases, bad words and penalties.

Each function takes the step's logits and gathers the rows' tables itself, so that nothing of them is read
where its `lax.cond` is not taken. Rows without the feature keep their logits bit for bit.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxllm.sampling.state import NO_TOKEN, RowScalars, RowTables, unpack_bits

_FORBIDDEN = -jnp.inf


def gather_rows(leaves: Shaped[Array, "rows ..."], rows: Int[Array, "seqs"]) -> Shaped[Array, "seqs ..."]:
    """Takes rows of a state's leaf; padding rows (past the end) read zeros."""
    return jnp.take(leaves, rows, axis=0, mode="fill", fill_value=0)


def keep_allowed(
    logits: Float[Array, "seqs vocab"],
    tables: RowTables,
    rows: Int[Array, "seqs"],
    wanted: Bool[Array, "seqs"],
) -> Float[Array, "seqs vocab"]:
    """Forbids what is not in `allowed_token_ids`."""
    allowed = unpack_bits(gather_rows(tables.allowed, rows), logits.shape[1])
    return jnp.where(wanted[:, None] & ~allowed, _FORBIDDEN, logits)


def forbid_bad_words(
    logits: Float[Array, "seqs vocab"],
    tables: RowTables,
    rows: Int[Array, "seqs"],
    wanted: Bool[Array, "seqs"],
    recent: Int[Array, "seqs window"],
    num_outputs: Int[Array, "seqs"],
) -> Float[Array, "seqs vocab"]:
    """Forbids the last token of a bad word where the output ends with the tokens before it."""
    words = gather_rows(tables.bad_words, rows)
    prefixes, last = words[:, :, :-1], words[:, :, -1]
    window = prefixes.shape[2]
    if recent.shape[1] < window:
        raise ValueError(f"recent has {recent.shape[1]} tokens of each row: must be at least {window}")
    recent = recent[:, recent.shape[1] - window :]
    # only the output counts, so a prompt's tokens match nothing
    in_output = jnp.arange(window, 0, -1) <= num_outputs[:, None]
    recent = jnp.where(in_output, recent, NO_TOKEN - 1)
    completes = jnp.all((prefixes == recent[:, None, :]) | (prefixes == NO_TOKEN), axis=2)
    return _forbid(logits, jnp.where(wanted[:, None] & completes, last, NO_TOKEN))


def forbid_stops(
    logits: Float[Array, "seqs vocab"],
    tables: RowTables,
    rows: Int[Array, "seqs"],
    wanted: Bool[Array, "seqs"],
) -> Float[Array, "seqs vocab"]:
    """Forbids end-of-sequence and stop tokens, for rows that have not reached `min_tokens`."""
    return _forbid(logits, jnp.where(wanted[:, None], gather_rows(tables.stop_ids, rows), NO_TOKEN))


def add_bias(
    logits: Float[Array, "seqs vocab"],
    tables: RowTables,
    rows: Int[Array, "seqs"],
    wanted: Bool[Array, "seqs"],
) -> Float[Array, "seqs vocab"]:
    """Adds `logit_bias`."""
    ids = jnp.where(wanted[:, None], gather_rows(tables.bias_ids, rows), NO_TOKEN)
    seqs, columns = _indices(logits, ids)
    return logits.at[seqs, columns].add(gather_rows(tables.bias_values, rows), mode="drop")


def apply_penalties(
    logits: Float[Array, "seqs vocab"],
    scalars: RowScalars,
    tables: RowTables,
    rows: Int[Array, "seqs"],
    wanted: Bool[Array, "seqs"],
) -> Float[Array, "seqs vocab"]:
    """Repetition penalty over prompt and output, then frequency and presence penalties over the output.

    Sources: https://arxiv.org/abs/1909.05858 and the OpenAI API's reference. `scalars` are the step's rows,
    already gathered.
    """
    counts = gather_rows(tables.output_counts, rows)
    seen = unpack_bits(gather_rows(tables.in_prompt, rows), logits.shape[1]) | (counts > 0)
    repetition = scalars.repetition_penalty[:, None]
    penalized = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    penalized -= scalars.frequency_penalty[:, None] * counts.astype(jnp.float32)
    penalized -= scalars.presence_penalty[:, None] * (counts > 0).astype(jnp.float32)
    return jnp.where(wanted[:, None], penalized, logits)


def count_tokens(
    output_counts: Int[Array, "rows vocab"],
    rows: Int[Array, "seqs"],
    tokens: Int[Array, "seqs"],
    wanted: Bool[Array, "seqs"],
) -> Int[Array, "rows vocab"]:
    """Counts each wanted row's new token, in place if the counts are donated and there are at least 2."""
    rows = jnp.where(wanted, rows, output_counts.shape[0])
    return output_counts.at[rows, tokens].add(1, mode="drop")


def _forbid(logits: Float[Array, "seqs vocab"], ids: Int[Array, "seqs ids"]) -> Float[Array, "seqs vocab"]:
    seqs, columns = _indices(logits, ids)
    return logits.at[seqs, columns].set(_FORBIDDEN, mode="drop")


def _indices(logits: Float[Array, "seqs vocab"], ids: Int[Array, "seqs ids"]) -> tuple[Array, Array]:
    """Where the ids are in the logits; NO_TOKEN goes out of range, since -1 would be the last column."""
    columns = jnp.where(ids == NO_TOKEN, logits.shape[1], ids)
    return jnp.arange(logits.shape[0])[:, None], columns
