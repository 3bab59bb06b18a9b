"""transformers' `generate` on batches of one length with random weights; prints a JSON line for each.

python transformers_peer.py FOLDER '{"batches": [1], "contexts": [64], "prompt": 256, "steps": 16}'
"""

import json
import sys
import time


def main(folder: str, asked: str) -> None:
    """Decode for each batch and context, then prefill; what does not fit in memory is said to."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    work = json.loads(asked)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(folder)
    torch.set_default_device(device)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def seconds(rows: int, context: int, tokens: int) -> float:
        ids = torch.randint(3, config.vocab_size, (rows, context))
        lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths
            )
        out.cpu()  # waits
        return time.perf_counter() - begin

    def report(name: str, **figures: object) -> None:
        print(json.dumps({"name": name, **figures}), flush=True)

    seconds(1, 16, 2)
    for context in work["contexts"]:
        for rows in work["batches"]:
            name = f"decode {rows} x {context}"
            try:
                first, whole = seconds(rows, context, 1), seconds(rows, context, 1 + work["steps"])
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                report(name, reason="out of memory")
                continue
            report(name, tokens_per_second=rows * work["steps"] / (whole - first))
    first = min(seconds(1, work["prompt"], 1) for _ in range(3))
    report(f"prefill {work['prompt']}", tokens_per_second=work["prompt"] / first)


if __name__ == "__main__":
    main(*sys.argv[1:])
