"""How a request's next token is distributed: a reference in float64 numpy, and draws from the sampler."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.sampling import (
    Limits,
    LogitsProcessor,
    SamplerConfig,
    SamplerState,
    SamplingParams,
    empty_state,
    load_row,
    row_settings,
    sample,
)

WINDOW = 5
SIZE = 8
"""Rows of a step and of its state."""
load = jax.jit(load_row, donate_argnums=0)


@dataclass(frozen=True)
class Case:
    """A request in the middle of its work."""

    params: SamplingParams
    prompt: tuple[int, ...] = (1, 2, 3)
    output: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int = field(default=0, kw_only=True)

    def settings(self, config: SamplerConfig):
        return row_settings(
            config,
            self.params,
            seed=self.params.seed or self.seed,
            prompt_token_ids=self.prompt,
            output_token_ids=self.output,
            stop_token_ids=self.stops,
            bad_word_ids=self.bad_words,
        )

    @property
    def known(self) -> tuple[int, ...]:
        return self.prompt + self.output


def reference(logits: np.ndarray, case: Case) -> np.ndarray:
    """The probabilities of the next token."""
    x, p = logits.astype(np.float64), case.params
    output = list(case.output)
    if p.allowed_token_ids is not None:
        x[[t for t in range(len(x)) if t not in p.allowed_token_ids]] = -np.inf
    for *prefix, last in case.bad_words:
        if len(prefix) <= len(output) and output[len(output) - len(prefix) :] == prefix:
            x[last] = -np.inf
    if len(output) < p.min_tokens:
        x[list(case.stops)] = -np.inf
    for token, bias in (p.logit_bias or {}).items():
        x[int(token)] += bias
    counts = np.bincount(output, minlength=len(x))
    seen = (counts > 0) | np.isin(np.arange(len(x)), case.prompt)
    x = np.where(seen, np.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty), x)
    x = x - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)
    if p.greedy:
        return np.eye(len(x))[np.argmax(x)]
    probs = softmax(x / p.temperature)
    probs[probs < p.min_p * probs.max()] = 0
    if p.top_k > 0:
        probs[probs < np.sort(probs)[-min(p.top_k, len(x))]] = 0
    if p.top_p < 1:
        probs /= probs.sum()
        heavier = np.array([probs[probs > q].sum() for q in probs])
        probs[heavier >= p.top_p] = 0
    return probs / probs.sum()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


@cache
def sampler(processors: tuple[LogitsProcessor, ...] = ()):
    return jax.jit(lambda *args: sample(*args, processors=processors), donate_argnums=1)


def config_of(vocab_size: int, processors: tuple[LogitsProcessor, ...] = ()) -> SamplerConfig:
    return SamplerConfig(
        vocab_size, Limits(logit_bias=4, stop_ids=4, bad_words=4, bad_word_tokens=4), processors
    )


def next_tokens(
    logits: Sequence[np.ndarray] | np.ndarray,
    cases: Sequence[Case],
    rows: Sequence[int] | None = None,
    processors: tuple[LogitsProcessor, ...] = (),
) -> tuple[list[int], SamplerState]:
    """One step of 8 rows, each case in its row of the state, the rest padding: tokens and state."""
    config = config_of(len(logits[0]), processors)
    rows = list(rows if rows is not None else range(len(cases)))
    state, padding = empty_state(config, SIZE), SIZE - len(cases)
    for row, case in zip(rows, cases, strict=True):
        state = load(state, np.int32(row), case.settings(config))
    tokens, state = sampler(processors)(
        jnp.array([*logits, *[logits[0]] * padding], jnp.float32),
        state,
        jnp.array(rows + [SIZE] * padding),
        jnp.array([len(case.known) for case in cases] + [1] * padding),
        jnp.array([window(case) for case in cases] + [(-1,) * WINDOW] * padding),
    )
    return np.asarray(tokens)[: len(cases)].tolist(), state


def window(case: Case) -> tuple[int, ...]:
    return ((-1,) * WINDOW + case.known)[-WINDOW:]


def draws(logits: np.ndarray, case: Case, number: int = 4096) -> np.ndarray:
    """Independent draws of a request's next token, each with a seed of its own."""
    config = config_of(len(logits))
    settings = case.settings(config)
    tables = settings.tables or Case(SamplingParams(presence_penalty=1)).settings(config).tables
    scalars, tables = jax.tree.map(
        lambda leaf: jnp.asarray(np.broadcast_to(leaf, (number, *leaf.shape))), (settings.scalars, tables)
    )
    seeds = np.random.default_rng(case.seed).integers(0, 2**32, (number, 2), np.uint32)
    state = SamplerState(replace(scalars, seed=jnp.asarray(seeds)), tables)
    tokens, _ = sampler()(
        jnp.tile(jnp.asarray(logits, jnp.float32), (number, 1)),
        state,
        jnp.arange(number, dtype=jnp.int32),
        jnp.full(number, len(case.known), jnp.int32),
        jnp.tile(jnp.array(window(case)), (number, 1)),
    )
    return np.asarray(tokens)


def stream(logits: np.ndarray, seed: int, number: int = 4096) -> np.ndarray:
    """What one request with a seed draws at positions 0, 1, ..., all with the same logits."""
    config = config_of(len(logits))
    settings = Case(SamplingParams(seed=seed)).settings(config)
    state = load(empty_state(config, number), np.int32(0), settings)
    tokens, _ = sampler()(
        jnp.tile(jnp.asarray(logits, jnp.float32), (number, 1)),
        state,
        jnp.zeros(number, jnp.int32),
        jnp.arange(number, dtype=jnp.int32),
        jnp.full((number, WINDOW), -1, jnp.int32),
    )
    return np.asarray(tokens)
