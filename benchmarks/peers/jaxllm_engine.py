"""This engine on the same workload; prints one JSON line.

python jaxllm_engine.py MODEL DTYPE WORKLOAD.json
"""

import json
import sys
import time

BEGIN = time.perf_counter()


def main(model: str, dtype: str, file: str) -> None:
    with open(file) as handle:
        work = json.load(handle)
    from jaxllm import Engine, SamplingParams

    options = {"max_model_len": 2048, "max_num_seqs": 64, "enable_prefix_caching": False, "progress": False}
    engine = Engine.from_pretrained(model, dtype=dtype, **options)
    ready = time.perf_counter() - BEGIN

    def seconds(prompts: list[list[int]], tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        engine.generate(prompts, params)
        return time.perf_counter() - begin

    output_len = work["output_len"]
    figures = {"startup_s": ready, "first_token_s": ready + seconds([work["single"]], 1)}
    engine.wait_for_programs()
    seconds(work["batch"][:2], 8)
    together = min(seconds(work["batch"], output_len) for _ in range(3))
    first = min(seconds([work["single"]], 1) for _ in range(3))
    whole = min(seconds([work["single"]], output_len) for _ in range(3))
    figures["throughput_tok_s"] = len(work["batch"]) * output_len / together
    figures["ttft_s"] = first
    figures["decode_tok_s"] = (output_len - 1) / (whole - first)
    figures["prefill_tok_s"] = len(work["long"]) / min(seconds([work["long"]], 1) for _ in range(3))
    engine.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
