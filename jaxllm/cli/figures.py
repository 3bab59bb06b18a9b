"""How fast requests were served, for the person at the terminal: one line on stderr."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine
    from jaxllm.engine.outputs import RequestOutput


class Figures:
    """Gathers what finished requests say of themselves, and the most KV pages seen in use while they ran."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._finished: list[RequestOutput] = []
        self._pages_used = 0

    def note(self, output: "RequestOutput") -> None:
        """Takes note of a request's output, finished or so far."""
        self._pages_used = max(self._pages_used, int(self._engine.get_metrics()["pages_used"]))
        if output.finished:
            self._finished.append(output)

    def print(self) -> None:
        """Prints the (mean) time to the first token, the tokens/s after it, and KV pages."""
        requests = [output.metrics for output in self._finished if output.metrics is not None]
        first = [m.time_to_first_token for m in requests if m.time_to_first_token is not None]
        if not first:
            return
        generated = sum(m.num_generation_tokens for m in requests)
        parts = [f"time to first token {1000 * sum(first) / len(first):.0f} ms"]
        start = min(m.first_token_time for m in requests if m.first_token_time is not None)
        seconds = max(m.last_token_time for m in requests if m.last_token_time is not None) - start
        if seconds > 0:
            parts.append(f"{(generated - len(first)) / seconds:.1f} tokens/s")
        parts.append(f"{sum(m.num_prompt_tokens for m in requests)} prompt and {generated} output tokens")
        if self._pages_used:
            total = int(self._engine.get_metrics()["num_pages"])
            parts.append(f"{self._pages_used} of {total} KV pages used")
        print(" · ".join(parts), file=sys.stderr)
