"""What the engine is measured on, and its peers with it.

The prompts are random token ids, so no tokenizer is timed and nothing stops early; every request runs
greedily to its full length. The same seeds give the same ids everywhere: Python's `random` promises that.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB_SIZE = 49152
"""Of SmolLM2."""
OUTPUT_LEN = 128
SHORTEST, LONGEST = 32, 256
"""Prompt tokens of the batch."""
NUM_PROMPTS = 32
SHARED_LEN = 1024
"""Prompt tokens that all requests of the prefix benchmark begin with."""
FIRST_ID = 100
"""Smaller ids are special tokens in many vocabularies."""


@dataclass(frozen=True)
class Item:
    """One request.

    prompt: text, token ids, or messages of a chat.
    due: seconds after the start at which it arrives.
    """

    prompt: Any
    output_len: int
    due: float = 0.0

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is messages, to be rendered with the model's template."""
        return isinstance(self.prompt, list) and isinstance(self.prompt[0], dict)


def random_prompts(
    count: int, shortest: int, longest: int, seed: int, vocab_size: int = VOCAB_SIZE
) -> list[list[int]]:
    """Prompts of random ids, each of a random length.

    Args:
        vocab_size: of a model whose vocabulary is smaller.
    """
    draw = random.Random(seed)
    size = min(vocab_size, VOCAB_SIZE)
    first = min(FIRST_ID, size // 2)
    return [
        [draw.randrange(first, size) for _ in range(draw.randint(shortest, longest))] for _ in range(count)
    ]


def batch(vocab_size: int = VOCAB_SIZE, count: int = NUM_PROMPTS) -> list[list[int]]:
    """Prompts of 32 to 256 tokens, to be given at once."""
    return random_prompts(count, SHORTEST, LONGEST, 0, vocab_size)


def make_items(
    vocab_size: int, *, num_prompts: int | None, input_len: int | None, output_len: int | None
) -> list[Item]:
    """The batch as requests, or one of other sizes."""
    count = num_prompts or NUM_PROMPTS
    if input_len is None:
        prompts = batch(vocab_size, count)
    else:
        prompts = random_prompts(count, input_len, input_len, 0, vocab_size)
    return [Item(prompt, output_len or OUTPUT_LEN) for prompt in prompts]


def single(vocab_size: int = VOCAB_SIZE, length: int = 128) -> list[int]:
    """The prompt of the request that runs alone."""
    return random_prompts(1, length, length, 5, vocab_size)[0]


def long(vocab_size: int = VOCAB_SIZE, length: int = 1024) -> list[int]:
    """The prompt whose prefill is timed."""
    return random_prompts(1, length, length, 6, vocab_size)[0]


def shared_prefix(
    vocab_size: int = VOCAB_SIZE, shared: int = 128, count: int = NUM_PROMPTS
) -> list[list[int]]:
    """Prompts that begin with the same `shared` tokens, each with 16 to 32 of its own."""
    own = random_prompts(count, 16, 32, 7, vocab_size)
    return [single(vocab_size, shared) + prompt for prompt in own]


def arrivals(rate: float, seed: int = 0) -> Iterator[float]:
    """Times of a Poisson process of `rate` arrivals a second, from the first one on."""
    draw = random.Random(seed)
    return itertools.accumulate(iter(lambda: draw.expovariate(rate), None))


def with_arrivals(items: Sequence[Item], rate: float) -> list[Item]:
    """The same requests, arriving at random at `rate` a second."""
    return [Item(item.prompt, item.output_len, due) for item, due in zip(items, arrivals(rate), strict=False)]


def read_dataset(path: Path, output_len: int = OUTPUT_LEN) -> list[Item]:
    """Requests from a file with a JSON object on each line.

    An object has one of `prompt` (text), `prompt_token_ids` and `messages`, and may have `output_len`.

    Raises:
        ValueError: a line that is no such object; the message names the file and the line.
        OSError: the file cannot be read.
    """
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                items.append(_item(json.loads(line), output_len))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    if not items:
        raise ValueError(f"{path}: it has no requests")
    return items


_PROMPTS = ("prompt", "prompt_token_ids", "messages")


def _item(entry: Any, output_len: int) -> Item:
    if not isinstance(entry, dict):
        raise ValueError("must be a JSON object")
    unknown = sorted(set(entry) - {*_PROMPTS, "output_len"})
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)}; known are {', '.join(_PROMPTS)}, output_len")
    forms = [name for name in _PROMPTS if name in entry]
    if len(forms) != 1:
        raise ValueError(f"must have exactly one of {', '.join(_PROMPTS)}")
    [form] = forms
    prompt, wanted = entry[form], entry.get("output_len", output_len)
    if type(wanted) is not int or wanted < 1:
        raise ValueError(f"output_len={wanted!r}: must be a whole number of at least 1")
    kind = {"prompt": str, "prompt_token_ids": int, "messages": dict}[form]
    parts = [prompt] if form == "prompt" else prompt
    if not prompt or not isinstance(parts, list) or any(type(part) is not kind for part in parts):
        wanted_form = {"prompt": "a string", "prompt_token_ids": "token ids", "messages": "messages"}[form]
        raise ValueError(f"{form}: must be {wanted_form}")
    return Item(prompt, wanted)
