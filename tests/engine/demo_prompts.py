"""What the demo model is asked: texts from one token to a page's worth and more, and conversations."""

from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "demo_golden" / "smollm2-135m-instruct.json"
NUM_TOKENS = 32

_STORY = (
    "Once upon a time, in a village between two rivers, there lived a clockmaker whose clocks ran backwards. "
    "Nobody knew why. Children came to watch the hands turn from evening to noon, and old people came "
    "because they hoped that it might work on them as well. One winter a stranger brought him a watch that "
    "had stopped on the day when"
)

TEXTS: tuple[str, ...] = (
    "The",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "2, 4, 8, 16, 32,",
    "Überraschung! 日本語と",
    _STORY,
)
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Name three colours of the rainbow."}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "What is gravity?"},
        {"role": "assistant", "content": "Gravity pulls masses towards each other."},
        {"role": "user", "content": "And who described it first?"},
    ],
)
