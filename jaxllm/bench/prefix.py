"""Prompts that begin the same: with no hits, with those that the batch itself makes possible, with all."""

import statistics
from typing import Any

from jaxllm.bench import workload
from jaxllm.bench.session import Run, Session
from jaxllm.bench.throughput import WARM_PROMPTS, WARM_TOKENS

PEERS_SHARED_LEN = 128
"""Shared tokens of the workload that peers run."""


def measure(
    session: Session,
    *,
    rounds: int,
    num_prompts: int = workload.NUM_PROMPTS,
    shared_len: int = workload.SHARED_LEN,
    output_len: int = workload.OUTPUT_LEN,
) -> dict[str, Any]:
    """Runs the prompts with no hits at all, with an empty cache, and once more.

    Raises:
        ValueError: the engine has no prefix cache.
    """
    if not session.parts.config.cache.enable_prefix_caching:
        raise ValueError("enable_prefix_caching=False: this compares hits with misses; leave it on")
    size = session.vocab_size
    prompts = workload.shared_prefix(size, shared_len, num_prompts)
    session.generate(prompts[:WARM_PROMPTS], min(WARM_TOKENS, output_len))
    runs: dict[str, list[Run]] = {"off": [], "cold": [], "warm": []}
    for _ in range(rounds):
        runs["off"].append(session.generate(prompts, output_len, skip_reading_prefix_cache=True))
        runs["cold"].append(session.generate(prompts, output_len))
        runs["warm"].append(session.generate(prompts, output_len, keep_cache=True))
    figures = {name: _figures(of) for name, of in runs.items()}
    few = workload.shared_prefix(size, PEERS_SHARED_LEN)
    return {
        "requests": num_prompts,
        "shared_len": shared_len,
        "output_len": output_len,
        **figures,
        "warm_to_off": _ratios(figures["warm"], figures["off"]),
        "warm_to_cold": _ratios(figures["warm"], figures["cold"]),
        "peers_workload": {
            "shared_prefix_cold_s": session.generate(few, 1).seconds,
            "shared_prefix_s": session.generate(few, 1, keep_cache=True).seconds,
        },
    }


def _figures(runs: list[Run]) -> dict[str, float]:
    """Medians over the rounds."""
    return {
        "seconds": statistics.median(run.seconds for run in runs),
        "ttft_seconds_mean": statistics.median(statistics.fmean(run.first_token_times) for run in runs),
        "ttft_seconds_median": statistics.median(statistics.median(run.first_token_times) for run in runs),
        "total_tokens_per_second": statistics.median(
            (run.prompt_tokens + run.output_tokens) / run.seconds for run in runs
        ),
        "hit_ratio": statistics.median(
            sum(request.num_cached_tokens for request in run.recording.requests) / run.prompt_tokens
            for run in runs
        ),
    }


def _ratios(of: dict[str, float], to: dict[str, float]) -> dict[str, float]:
    names = ("ttft_seconds_mean", "ttft_seconds_median", "total_tokens_per_second")
    return {name: of[name] / to[name] for name in names}
