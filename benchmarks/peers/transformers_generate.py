"""transformers' generate with one left-padded batch, on a workload in a file; prints one JSON line.

python transformers_generate.py MODEL_DIR DTYPE WORKLOAD.json
"""

import json
import sys
import time

BEGIN = time.perf_counter()
PADDING = 2


def main(model_dir: str, dtype: str, file: str) -> None:
    with open(file) as handle:
        work = json.load(handle)
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
    ready = time.perf_counter() - BEGIN

    def seconds(prompts, tokens):
        width = max(map(len, prompts))
        ids = torch.tensor([[PADDING] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=PADDING, **lengths)
        return time.perf_counter() - begin

    output_len = work["output_len"]
    figures = {"startup_s": ready, "first_token_s": ready + seconds([work["single"]], 1)}
    seconds(work["batch"][:2], 4)
    figures["throughput_tok_s"] = len(work["batch"]) * output_len / seconds(work["batch"], output_len)
    first = min(seconds([work["single"]], 1) for _ in range(3))
    figures["ttft_s"] = first
    figures["decode_tok_s"] = (output_len - 1) / (seconds([work["single"]], output_len) - first)
    figures["prefill_tok_s"] = len(work["long"]) / min(seconds([work["long"]], 1) for _ in range(3))
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
