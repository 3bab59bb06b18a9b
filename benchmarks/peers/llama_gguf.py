"""llama.cpp on a workload in a file, one request at a time; prints one JSON line.

python llama_gguf.py MODEL.gguf THREADS WORKLOAD.json
"""

import json
import sys
import time

BEGIN = time.perf_counter()


def main(gguf: str, threads: str, file: str) -> None:
    with open(file) as handle:
        work = json.load(handle)
    from llama_cpp import Llama

    count = int(threads)
    model = Llama(gguf, n_ctx=4096, n_threads=count, n_threads_batch=count, n_batch=512, verbose=False)
    ready = time.perf_counter() - BEGIN

    def seconds(prompt, tokens):
        """To the first token, and from it to the last."""
        model.reset()
        begin = time.perf_counter()
        model.eval(prompt)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            model.eval([model.sample(temp=0)])
        return first - begin, time.perf_counter() - first

    figures = {"startup_s": ready, "first_token_s": ready + seconds(work["single"], 1)[0]}
    runs = [seconds(work["single"], work["output_len"]) for _ in range(3)]
    figures["ttft_s"] = min(first for first, _ in runs)
    figures["decode_tok_s"] = (work["output_len"] - 1) / min(rest for _, rest in runs)
    figures["prefill_tok_s"] = len(work["long"]) / min(seconds(work["long"], 1)[0] for _ in range(3))
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
