"""The programs of the engine as pure functions: forward pass, sampler, admission, scores of prompts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int32, UInt32

from jaxllm.layers.batch import Batch, Cache
from jaxllm.models.base import CausalLM
from jaxllm.models.stages import Stage, StageModel
from jaxllm.runner.step_input import StepLayout
from jaxllm.sampling.logprobs import token_logprobs
from jaxllm.sampling.sampler import sample
from jaxllm.sampling.state import RowSettings, SamplerConfig, SamplerState, load_row
from pallas_kernels.paged_attention import Backend, RaggedBatch, locate_tokens

Merge = Callable[[tuple[Array, ...]], CausalLM | StageModel]
"""Makes the model, or what a stage runs of it, of its weights, while a program is traced."""

Logprobs = tuple[Array, Array, Array, Array]
"""What `token_logprobs` returns: the tokens' own, their ranks, the likeliest ids and their logprobs."""
NUM_LOGPROBS = 4

SCORED_TOGETHER = 64
"""Tokens whose logits are held at once when a prompt is scored: 12 MB for a vocabulary of 49,152."""


class DeviceRows(NamedTuple):
    """What the device knows of each running request; the last row is a spare one for padding."""

    tokens: Int32[Array, "rows length"] | None
    """Known tokens by position, prompt and output. Stages between the first and the last have none."""
    tables: Int32[Array, "groups rows pages"]
    """Page ids by position, for each group of layers."""
    sampler: SamplerState | None
    """Of the last stage."""


class Forward(NamedTuple):
    """What a step's forward pass leaves for the programs after it."""

    logits: Float[Array, "sampled vocab"] | None
    """Of the last stage."""
    rows: Int32[Array, " sampled"]
    """Row on the device that each row of the logits is sampled for; the spare one where none is."""
    lengths: Int32[Array, " sampled"]
    """Known tokens of that row: the position of the next one."""
    hidden: Float[Array, "tokens embed"]
    """After the last norm, or what the next stage takes."""
    expert_load: Int32[Array, "layers slots"] | None = None
    """Tokens that went to each expert, or copy, of the layers that have any; None where nobody counts."""


def run_forward(
    params: tuple[Array, ...],
    cache: Cache,
    tables: Int32[Array, "groups rows pages"],
    entering: Int32[Array, "rows length"] | Float[Array, "tokens embed"],
    packed: Int32[Array, " size"],
    *,
    merge: Merge,
    layout: StepLayout,
    slots: tuple[tuple[int, int], ...],
    backend: Backend,
    stage: Stage,
    first_layer: int,
    count_experts: bool = False,
) -> tuple[Cache, Int32[Array, "groups rows pages"], Forward]:
    """Runs a ragged batch through the model, or a stage of it: the cache and the page tables are updated.

    The inputs are gathered from the rows' known tokens on the device, so a step can be started before the
    host has seen the tokens of the one before.

    Args:
        entering: the rows' known tokens, or hidden states where the stage is not the first.
        slots: of the stage's layers, from `first_layer` on.
    """
    step = layout.unpack(packed)
    entries = tables.reshape(-1).at[step.table_index].set(step.table_page, mode="drop")
    tables = entries.reshape(tables.shape)
    groups = tuple(
        RaggedBatch(step.query_start, step.kv_lens, table[step.row_ids], step.num_rows) for table in tables
    )
    place = locate_tokens(groups[0], layout.bucket.tokens)
    positions = jnp.where(place.valid, place.position, 0)
    if stage.is_first:
        entering = jnp.where(place.valid, entering[step.row_ids[place.row], positions], 0)

    model = merge(params)
    load: list[Array] | None = [] if count_experts else None
    hidden, cache = model(entering, cache, Batch(positions, groups, slots, backend, load, first_layer))

    # Padded to what the sampler takes before the product: padding the logits would copy all of them.
    def padded(x: Array, fill: int | Array) -> Array:
        return jnp.pad(x, (0, layout.bucket.sampled - layout.bucket.rows), constant_values=fill)

    spare = layout.table_shape[1] - 1
    last = padded(jnp.maximum(step.query_start[1:] - 1, 0), 0)
    rows = padded(jnp.where(step.samples, step.row_ids, spare), spare)
    logits, lengths = model.logits(hidden[last]) if stage.is_last else None, padded(step.kv_lens, 0)
    return cache, tables, Forward(logits, rows, lengths, hidden, jnp.stack(load) if load else None)


def run_gathered(
    params: tuple[Array, ...],
    cache: Cache,
    tables: Int32[Array, "groups rows pages"],
    entering: Float[Array, "tokens embed"],
    packed: Int32[Array, " size"],
    *,
    forward: Callable[..., tuple[Cache, Int32[Array, "groups rows pages"], Forward]],
    whole: NamedSharding,
) -> tuple[Cache, Int32[Array, "groups rows pages"], Forward]:
    """As `run_forward`, of hidden states that come in parts: its layers want them whole."""
    return forward(params, cache, tables, lax.with_sharding_constraint(entering, whole), packed)


def run_sampler(
    tokens: Int32[Array, "rows length"],
    state: SamplerState,
    logits: Float[Array, "sampled vocab"],
    rows: Int32[Array, " sampled"],
    lengths: Int32[Array, " sampled"],
    *,
    sampler: SamplerConfig,
) -> tuple[Int32[Array, "rows length"], SamplerState, Int32[Array, " sampled"]]:
    """Chooses each row's next token and writes it where the next step finds it."""
    recent = _recent(tokens, rows, lengths, sampler.limits.bad_word_tokens)
    chosen, state = sample(logits, state, rows, lengths, recent, processors=sampler.processors)
    return receive_tokens(tokens, rows, lengths, chosen), state, chosen


def _recent(tokens: Array, rows: Array, lengths: Array, count: int) -> Int32[Array, "rows count"]:
    """The last `count` known tokens of each row, -1 where there are fewer."""
    position = lengths[:, None] - count + jnp.arange(count)
    return jnp.where(position >= 0, tokens[rows[:, None], position], -1)


def load_masks(
    allowed: UInt32[Array, "rows words"],
    rows: Int32[Array, " sampled"],
    masks: UInt32[Array, "sampled words"],
) -> UInt32[Array, "rows words"]:
    """Replaces what some rows allow their next tokens to be; rows past the end are left out."""
    return allowed.at[rows].set(masks, mode="drop")


def receive_tokens(
    tokens: Int32[Array, "rows length"],
    rows: Int32[Array, " sampled"],
    lengths: Int32[Array, " sampled"],
    chosen: Int32[Array, " sampled"],
) -> Int32[Array, "rows length"]:
    """Writes what the last stage sampled where the first one finds it."""
    return tokens.at[rows, lengths].set(chosen, mode="drop")


def admit_row(
    rows: DeviceRows,
    row: Int32[Array, " 1"],
    tokens: Int32[Array, " length"],
    tables: Int32[Array, "groups pages"],
    settings: RowSettings,
) -> DeviceRows:
    """Gives a row to a request: its known tokens, its pages, and its sampling parameters.

    Args:
        row: past the end where it is a row of another data group.
    """
    return DeviceRows(
        None if rows.tokens is None else rows.tokens.at[row[0]].set(tokens, mode="drop"),
        rows.tables.at[:, row[0]].set(tables, mode="drop"),
        None if rows.sampler is None else load_row(rows.sampler, row[0], settings),
    )


def score_tokens(
    params: tuple[Array, ...],
    hidden: Float[Array, "tokens embed"],
    targets: Int32[Array, " tokens"],
    *,
    merge: Merge,
    k: int,
) -> Logprobs:
    """Logprobs of `targets[i]` as the token after the one that `hidden[i]` belongs to."""
    model = merge(params)
    together = min(SCORED_TOGETHER, targets.shape[0])
    spare = -targets.shape[0] % together
    chunks = (
        jnp.pad(hidden, ((0, spare), (0, 0))).reshape(-1, together, hidden.shape[1]),
        jnp.pad(targets, (0, spare)).reshape(-1, together),
    )
    scores = lax.map(lambda chunk: token_logprobs(model.logits(chunk[0]), chunk[1], k), chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: targets.shape[0]], scores)
