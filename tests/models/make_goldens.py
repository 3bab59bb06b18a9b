"""Makes the golden files for parity: run `python tests/models/make_goldens.py` where torch is installed.

For each case a folder with the config, the weights where they are its own, and the reference's prompts,
tokens and logits.
"""

import shutil
import sys

import numpy as np
from family_cases import CASES, GOLDENS, SEEDS
from transformers_reference import continue_greedily, make_model, make_prompts, save_checkpoint


def main() -> None:
    shutil.rmtree(GOLDENS, ignore_errors=True)
    for name, case in CASES.items():
        own = case.weights or name
        seed = SEEDS[own]
        model = make_model(case, seed)
        folder = GOLDENS / name
        arrays = {}
        for row, prompt in enumerate(make_prompts(model.config.vocab_size, seed)):
            logits, tokens = continue_greedily(model, prompt)
            arrays |= {f"prompt{row}": prompt, f"tokens{row}": tokens, f"logits{row}": logits}
        save_checkpoint(model, folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if case.weights:
            (folder / "model.safetensors").unlink()
        np.savez_compressed(folder / "golden.npz", **arrays)
        print(f"{name}: largest logit {np.abs(arrays['logits0']).max():.2f}", file=sys.stderr)


if __name__ == "__main__":
    main()
