"""Makes a row's settings from a request, on the host."""

from collections.abc import Collection, Sequence

import numpy as np

from jaxllm.sampling.params import SamplingParams
from jaxllm.sampling.processors import select_processors
from jaxllm.sampling.state import NO_TOKEN, Feature, RowScalars, RowSettings, RowTables, SamplerConfig

_LARGEST, _SMALLEST = 1e30, 1e-30
"""Bounds for what is divided by: XLA multiplies by the reciprocal, which has to be a normal float32 too."""


def row_settings(
    config: SamplerConfig,
    params: SamplingParams,
    *,
    seed: int,
    prompt_token_ids: Sequence[int],
    output_token_ids: Sequence[int] = (),
    stop_token_ids: Collection[int] = (),
    bad_word_ids: Sequence[Sequence[int]] = (),
) -> RowSettings:
    """Makes a row's settings from a request, on the host.

    Args:
        seed: `params.seed`, or one drawn for the request.
        output_token_ids: what it has generated already (a request that resumes after preemption).
        stop_token_ids: tokens that `min_tokens` holds back: end-of-sequence and stop tokens.
        bad_word_ids: the token sequences of `params.bad_words`.

    Raises:
        ValueError: more of something than the limits have room for, ids outside the vocabulary, or a logits
            processor that is not there.
    """
    bits, processor_params = select_processors(config.processors, params)
    features = _features(params, bool(bits), bool(stop_token_ids), bool(bad_word_ids))
    scalars = _scalars(params, seed, len(prompt_token_ids), features, bits)
    if not features:
        return RowSettings(scalars, None)
    tables = _empty_tables(config)
    _fill_lists(tables, config, params, stop_token_ids, bad_word_ids)
    if Feature.ALLOWED in features:
        tables.allowed[:] = pack_bits(params.allowed_token_ids or (), config.vocab_size, "allowed_token_ids")
    if Feature.COUNTS in features:
        tables.processor_params[:] = processor_params
        tables.in_prompt[:] = pack_bits(prompt_token_ids, config.vocab_size, "prompt_token_ids")
        ids = _checked(output_token_ids, config.vocab_size, "output_token_ids")
        tables.output_counts[:] = np.bincount(ids, minlength=config.vocab_size)
    return RowSettings(scalars, tables)


def pack_bits(token_ids: Collection[int], vocab_size: int, name: str) -> np.ndarray:
    """Packs a set of token ids into uint32 words, the lowest bit first.

    Raises:
        ValueError: an id outside the vocabulary; the message says which, and `name`.
    """
    mask = np.zeros(-(-vocab_size // 32) * 32, bool)
    mask[_checked(token_ids, vocab_size, name)] = True
    return np.packbits(mask, bitorder="little").view("<u4").astype(np.uint32)


def _features(params: SamplingParams, processors: bool, stop_ids: bool, bad_words: bool) -> Feature:
    penalties = (
        params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    )
    wanted = {
        Feature.ALLOWED: params.allowed_token_ids is not None or params.structured_outputs is not None,
        Feature.BAD_WORDS: bad_words,
        Feature.MIN_TOKENS: params.min_tokens > 0 and stop_ids,
        Feature.BIAS: bool(params.logit_bias),
        Feature.PENALTIES: penalties,
        Feature.COUNTS: penalties or processors,
    }
    features = Feature(0)
    for feature, needed in wanted.items():
        features |= feature if needed else Feature(0)
    return features


def _scalars(
    params: SamplingParams, seed: int, prompt_length: int, features: Feature, processors: np.uint32
) -> RowScalars:
    seed %= 2**64  # a negative seed as its two's complement
    return RowScalars(
        features=np.uint32(features),
        processors=processors,
        seed=np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
        temperature=np.float32(0 if params.greedy else min(params.temperature, _LARGEST)),
        top_k=np.int32(min(max(params.top_k, 0), 2**31 - 1)),
        # 0 means off on the device: a tiny top_p must not become 0
        top_p=np.float32(0 if params.top_p == 1 else max(params.top_p, _SMALLEST)),
        min_p=np.float32(params.min_p),
        prompt_length=np.int32(prompt_length),
        min_length=np.int32(prompt_length + params.min_tokens),
        repetition_penalty=np.float32(min(max(params.repetition_penalty, _SMALLEST), _LARGEST)),
        presence_penalty=np.float32(params.presence_penalty),
        frequency_penalty=np.float32(params.frequency_penalty),
    )


def _empty_tables(config: SamplerConfig) -> RowTables:
    limits, words = config.limits, -(-config.vocab_size // 32)
    return RowTables(
        bias_ids=np.full(limits.logit_bias, NO_TOKEN, np.int32),
        bias_values=np.zeros(limits.logit_bias, np.float32),
        stop_ids=np.full(limits.stop_ids, NO_TOKEN, np.int32),
        bad_words=np.full((limits.bad_words, limits.bad_word_tokens), NO_TOKEN, np.int32),
        processor_params=np.zeros(sum(len(p.parameters) for p in config.processors), np.float32),
        allowed=np.zeros(words, np.uint32),
        in_prompt=np.zeros(words, np.uint32),
        output_counts=np.zeros(config.vocab_size, np.int32),
    )


def _fill_lists(
    tables: RowTables,
    config: SamplerConfig,
    params: SamplingParams,
    stop_token_ids: Collection[int],
    bad_word_ids: Sequence[Sequence[int]],
) -> None:
    limits, vocab_size = config.limits, config.vocab_size
    bias = params.logit_bias or {}
    _check_limit("logit_bias", len(bias), limits.logit_bias, "entries")
    tables.bias_ids[: len(bias)] = _checked([int(token) for token in bias], vocab_size, "logit_bias")
    tables.bias_values[: len(bias)] = list(bias.values())
    stops = stop_token_ids if params.min_tokens > 0 else ()
    _check_limit("stop_token_ids", len(stops), limits.stop_ids, "ids with min_tokens")
    tables.stop_ids[: len(stops)] = _checked(stops, vocab_size, "stop_token_ids")
    _check_limit("bad_words", len(bad_word_ids), limits.bad_words, "token sequences")
    for row, word in zip(tables.bad_words, bad_word_ids, strict=False):
        _check_limit("bad_words", len(word), limits.bad_word_tokens, "tokens in a word")
        row[len(row) - len(word) :] = _checked(word, vocab_size, "bad_words")


def _check_limit(name: str, count: int, limit: int, what: str) -> None:
    if count > limit:
        raise ValueError(f"{name}: {count} {what}; at most {limit} are supported")


def _checked(token_ids: Collection[int], vocab_size: int, name: str) -> np.ndarray:
    ids = np.array(tuple(token_ids), np.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(f"{name} has {outside[:8].tolist()}: token ids must be in 0 to {vocab_size - 1}")
    return ids
