"""What is imported, and above all what is not: each of these takes a tenth of a second or several."""

import subprocess
import sys

import pytest

HEAVY = ("flax", "huggingface_hub", "jax", "matplotlib", "orbax", "torch", "transformers")


def imported_by(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has imported after running `code`."""
    print_them = f"import sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{print_them}"], capture_output=True, check=True)
    return set(done.stdout.decode().splitlines()[-1].split())


@pytest.mark.parametrize(
    ("code", "needed"),
    [
        ("import jaxllm", set()),
        ("import jaxllm.cli.main", set()),
        ("import jaxllm.cli.generate, jaxllm.cli.chat", {"jax"}),
        ("from jaxllm import Engine, AsyncEngine, LLM", {"flax", "jax"}),
        ("import jaxllm.server.run", {"flax", "jax"}),
        (
            "from converters.tokenizer import open_tokenizer\n"
            "tokenizer = open_tokenizer('smollm2-135m-instruct')\n"
            "assert tokenizer.encode('Water boils at') == [12615, 36411, 418]\n"
            "assert tokenizer.eos_token_id == 2 and tokenizer.chat_template",
            set(),
        ),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str, needed: set[str]) -> None:
    assert imported_by(code) == needed
