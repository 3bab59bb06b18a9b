"""Names for the beginnings of prompts that have not been tokenized, by which a router tells them apart."""

import hashlib
import json
from typing import Any

BLOCK = 64
"""Characters that a name covers besides those before it: some 16 tokens of English, a page."""
MOST_BLOCKS = 1024
_FIRST = ("model", "cache_salt", "system", "instructions", "tools", "messages", "prompt", "input")
"""Fields that make a prompt, in the order in which templates write them."""


def prompt_names(body: bytes) -> tuple[bytes, ...]:
    """For each full block of a request's prompt a name, which is the same only where all before it is, too.

    Args:
        body: of the request, in any of the server's formats; none comes of what is no JSON object.
    """
    try:
        fields = json.loads(body)
    except ValueError:
        return ()
    if not isinstance(fields, dict):
        return ()
    text = "".join(f"{name}={_flat(fields[name])}" for name in _FIRST if fields.get(name) is not None)
    names, chain = [], hashlib.sha256()
    for begin in range(0, min(len(text), MOST_BLOCKS * BLOCK) - BLOCK + 1, BLOCK):
        chain.update(text[begin : begin + BLOCK].encode(errors="replace"))
        names.append(chain.digest()[:16])
    return tuple(names)


def _flat(value: Any) -> str:
    """A field as text that begins alike where values do."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
