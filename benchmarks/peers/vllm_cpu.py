"""vLLM's CPU build on a workload in a file; prints one JSON line.

python vllm_cpu.py MODEL_DIR DTYPE WORKLOAD.json
"""

import json
import os
import sys
import time

BEGIN = time.perf_counter()
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main(model: str, dtype: str, file: str) -> None:
    with open(file) as handle:
        work = json.load(handle)
    from vllm import LLM, SamplingParams

    engine = LLM(model=model, dtype=dtype, max_model_len=2048, max_num_seqs=64, enable_prefix_caching=False)
    ready = time.perf_counter() - BEGIN

    def seconds(prompts, tokens):
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return time.perf_counter() - begin

    output_len = work["output_len"]
    figures = {"startup_s": ready, "first_token_s": ready + seconds([work["single"]], 1)}
    seconds(work["batch"][:2], 8)
    together = min(seconds(work["batch"], output_len) for _ in range(3))
    first = min(seconds([work["single"]], 1) for _ in range(3))
    whole = min(seconds([work["single"]], output_len) for _ in range(3))
    figures["throughput_tok_s"] = len(work["batch"]) * output_len / together
    figures["ttft_s"] = first
    figures["decode_tok_s"] = (output_len - 1) / (whole - first)
    figures["prefill_tok_s"] = len(work["long"]) / min(seconds([work["long"]], 1) for _ in range(3))
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
