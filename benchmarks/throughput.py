"""How fast the engine is on this machine, with random prompts so that no tokenizer is timed.

    python benchmarks/throughput.py [MODEL] [--rounds N]

Three measurements, each after a round that does not count: one request alone (128 prompt tokens, 128 output
tokens), 32 requests at once (32 to 256 prompt tokens, 128 output tokens each), and one long prompt (1024
tokens). All run greedily to their full length. The best and the median round are printed: on a machine that
does other work too, the best is nearest to what the engine can do.
"""

import argparse
import random
import statistics
import time

from jaxllm import Engine, RequestOutput, SamplingParams

OUTPUT_TOKENS = 128
MAX_MODEL_LEN = 1280


def prompts(engine: Engine, count: int, shortest: int, longest: int, seed: int) -> list[list[int]]:
    """Random token ids, different for every seed, so that no prefix is found in the cache."""
    draw, size = random.Random(seed), len(engine.get_tokenizer())
    return [[draw.randrange(size) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]


def run(engine: Engine, batch: list[list[int]], max_tokens: int) -> tuple[float, list[RequestOutput]]:
    """Seconds from the first request to the last token, and the outputs."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    outputs = engine.generate(batch, params)
    return time.perf_counter() - begin, outputs


def alone(engine: Engine, seed: int) -> dict[str, float]:
    """Time to the first token, and how fast the others follow."""
    _, [output] = run(engine, prompts(engine, 1, 128, 128, seed), OUTPUT_TOKENS)
    times = output.metrics
    assert times is not None
    assert times.time_to_first_token is not None
    assert times.end_to_end_time is not None
    decoding = times.end_to_end_time - times.time_to_first_token
    return {
        "one request: seconds to the first token": times.time_to_first_token,
        "one request: output tokens/s after it": (OUTPUT_TOKENS - 1) / decoding,
    }


def together(engine: Engine, seed: int) -> dict[str, float]:
    """Output tokens by the time that all requests take."""
    seconds, outputs = run(engine, prompts(engine, 32, 32, 256, seed), OUTPUT_TOKENS)
    return {"32 requests: output tokens/s": len(outputs) * OUTPUT_TOKENS / seconds}


def prefill(engine: Engine, seed: int) -> dict[str, float]:
    """Prompt tokens by the time to the first output token."""
    seconds, _ = run(engine, prompts(engine, 1, 1024, 1024, seed), 1)
    return {"one long prompt: prompt tokens/s": 1024 / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the engine's speed.")
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with Engine.from_pretrained(arguments.model, max_model_len=MAX_MODEL_LEN) as engine:
        print(f"{engine.get_metrics()['compile_seconds']:.0f} s to make the programs ready", flush=True)
        for measure in (alone, together, prefill):
            measure(engine, seed=0)
            rounds = [measure(engine, seed) for seed in range(1, arguments.rounds + 1)]
            for name in rounds[0]:
                values = [found[name] for found in rounds]
                best = min(values) if "seconds" in name else max(values)
                print(f"{name:42} best {best:8.3g}   median {statistics.median(values):8.3g}", flush=True)


if __name__ == "__main__":
    main()
