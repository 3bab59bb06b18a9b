"""One request alone: how soon the first token comes, and how fast the others; and a long prompt's prefill."""

from typing import Any

from jaxllm.bench import workload
from jaxllm.bench.figures import spread
from jaxllm.bench.session import Run, Session
from jaxllm.bench.throughput import WARM_TOKENS


def measure(
    session: Session,
    *,
    rounds: int,
    input_len: int = 128,
    output_len: int = workload.OUTPUT_LEN,
    long_len: int = 1024,
) -> tuple[dict[str, Any], Run]:
    """Times a prompt of `input_len` tokens with 1 and with `output_len` output tokens, and a long one with 1.

    Decode speed is the tokens after the first by the time that they take: the best whole run less the best
    time to the first token, as the peers' figures are made.
    """
    prompt = workload.single(session.vocab_size, input_len)
    long = workload.long(session.vocab_size, long_len)
    session.generate([prompt], min(WARM_TOKENS, output_len))
    first = [session.generate([prompt], 1).seconds for _ in range(rounds)]
    whole = [session.generate([prompt], output_len) for _ in range(rounds)]
    session.generate([long], 1)
    prefill = [session.generate([long], 1).seconds for _ in range(rounds)]
    seconds = [run.seconds for run in whole]
    decode = (output_len - 1) / (min(seconds) - min(first)) if output_len > 1 else None
    best = min(whole, key=lambda run: run.seconds)
    return {
        "input_len": input_len,
        "output_len": output_len,
        "ttft_seconds": spread(first, most=False),
        "whole_seconds": spread(seconds, most=False),
        "decode_tokens_per_second": decode,
        "long_len": long_len,
        "prefill_tokens_per_second": spread([long_len / s for s in prefill], most=True),
        "best_round": best.figures(),
    }, best
