"""A request's tokens do not depend on what happens around it."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import golden, small_engine

from jaxllm import Engine, SamplingParams

MODELS = ("llama", "gemma3", "mixtral")
"""Full attention; full and sliding layers; experts."""

CALM: dict[str, Any] = {"async_scheduling": False, "enable_prefix_caching": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "calm": CALM,
    "asynchronous": CALM | {"async_scheduling": True},
    "cached": {"async_scheduling": False},
    "asynchronous and cached": {},
    "chunks of 8": CALM | {"max_num_batched_tokens": 8},
    "asynchronous chunks of 2, cached": {"max_num_batched_tokens": 2},
    "by priority": {"policy": "priority"},
    "no chunks": {"enable_chunked_prefill": False, "max_num_batched_tokens": 64},
}
"""All on 60 pages, so few that requests preempt each other; and so their programs are mostly the same."""


@functools.cache
def engine(model: str, variant: str) -> Engine:
    return small_engine(model, max_model_len=96, num_pages=60, **VARIANTS[variant])


@dataclass(frozen=True)
class Case:
    """A request, and when it comes and goes."""

    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0


def _case(seed: int) -> Case:
    """One of a hundred different requests; half of them begin with the same tokens."""
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(0).integers(3, 125, 24).tolist()
    prompt = (shared if seed % 2 else []) + rng.integers(3, 125, rng.integers(1, 40)).tolist()
    sampled = {"temperature": 0.9, "seed": seed}
    kind = [
        {"temperature": 0.0},
        sampled,
        sampled | {"top_k": 5, "top_p": 0.8},
        sampled | {"min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        sampled | {"logit_bias": {7: 3.0}, "allowed_token_ids": list(range(3, 90))},
    ][seed % 6]
    params = SamplingParams(max_tokens=int(rng.integers(1, 24)), ignore_eos=True, detokenize=False, **kind)
    return Case(tuple(prompt), params, priority=seed % 3)


@functools.cache
def alone(model: str, seed: int) -> list[int]:
    """The tokens of a request that has the engine for itself."""
    case = _case(seed)
    [output] = engine(model, "calm").generate([list(case.prompt)], case.params)
    return list(output.outputs[0].token_ids)


def run(engine: Engine, arrivals: list[tuple[int, int]]) -> dict[str, list[int]]:
    """Adds each (step, seed) at its step, runs until all have finished, and returns their tokens."""
    waiting = sorted(arrivals)
    tokens: dict[str, list[int]] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][0] <= step:
            _, seed = waiting.pop(0)
            case = _case(seed)
            engine.add_request(f"{seed}", list(case.prompt), case.params, priority=case.priority)
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return tokens


@pytest.mark.parametrize("model", MODELS)
def test_alone_is_the_reference(model: str) -> None:
    """One at a time, the engine says what transformers says."""
    reference = golden(model)
    for row in range(2):
        prompt, expected = reference[f"prompt{row}"].tolist(), reference[f"tokens{row}"].tolist()
        params = SamplingParams(temperature=0, max_tokens=len(expected), ignore_eos=True, detokenize=False)
        [output] = engine(model, "calm").generate([prompt], params)
        assert output.outputs[0].token_ids == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=3)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 99)), min_size=4, max_size=9, unique_by=lambda a: a[1]
    )
)
def test_same_tokens(model: str, variant: str, arrivals: list[tuple[int, int]]) -> None:
    tokens = run(engine(model, variant), arrivals)
    assert tokens == {f"{seed}": alone(model, seed) for _, seed in arrivals}
    cache = engine(model, variant)._core.scheduler.cache.stats()
    assert cache.num_used == 0


@pytest.mark.parametrize("model", MODELS)
def test_everything_really_happens(model: str) -> None:
    """Thirty requests at once: without preemption and hits the tests above would prove nothing."""
    crowd = [(0, seed) for seed in range(30)]
    expected = {f"{seed}": alone(model, seed) for _, seed in crowd}
    crowded = engine(model, "asynchronous and cached")
    before = crowded.get_metrics()
    assert run(crowded, crowd) == expected
    after = crowded.get_metrics()
    assert after["preemptions_total"] > before["preemptions_total"]
    assert after["prefix_cache_hits_total"] > before["prefix_cache_hits_total"]
    assert after["programs_compiled_late_total"] == 0


@pytest.mark.parametrize("model", MODELS)
def test_warm_prefix_cache(model: str) -> None:
    """The second time nearly all of the prompt is found, and the tokens are the same."""
    cached = engine(model, "cached")
    cached.reset_prefix_cache()
    case = _case(3)
    cold, warm = (cached.generate([list(case.prompt)], case.params)[0] for _ in range(2))
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens is not None
    assert warm.num_cached_tokens >= len(case.prompt) - 2 * 4
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids == alone(model, 3)


def test_samples_of_one_request() -> None:
    """n samples are what n requests with seeds that count up give."""
    prompt = list(_case(1).prompt)
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=9, ignore_eos=True, detokenize=False)
    busy = engine("llama", "asynchronous and cached")
    [together] = busy.generate([prompt], params)
    singles = [
        SamplingParams(temperature=1.0, seed=5 + i, max_tokens=9, ignore_eos=True, detokenize=False)
        for i in range(3)
    ]
    apart = engine("llama", "calm").generate([prompt] * 3, singles)
    assert [o.token_ids for o in together.outputs] == [o.outputs[0].token_ids for o in apart]
    assert len({tuple(o.token_ids) for o in together.outputs}) == 3
