"""Compiles grammars beside the step loop, and keeps those that were used last."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from jaxllm.structured.grammar import Grammar
from jaxllm.structured.params import StructuredOutputsParams
from jaxllm.structured.tokens import TokenTable

COMPILE_SECONDS = 10.0
"""How long a request waits for its grammar. Most take a millisecond."""
LATE = f"structured_outputs.{{}}: not compiled within {COMPILE_SECONDS:g} s; make it simpler"
"""What a request is told whose grammar is not there by then; with the constraint's name."""
MOST_KEPT = 64
"""Grammars, of at most 20 MB each."""
THREADS = 4
"""So many grammars that take long can be under way before others have to wait for them."""
STACK_BYTES = 1 << 29
"""Of each thread: 10 kB for each definition of a schema that leads to the next. Unused, it costs nothing."""


class GrammarCompiler:
    """Compiled grammars by their constraints. May be used from any thread.

    Args:
        make_tokens: makes the vocabulary, when the first grammar needs it.
    """

    def __init__(self, make_tokens: Callable[[], TokenTable]) -> None:
        self._make_tokens = make_tokens
        self._tokens: TokenTable | None = None
        self._making = threading.Lock()
        self._kept: OrderedDict[StructuredOutputsParams, Future[Grammar]] = OrderedDict()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._renewing: ThreadPoolExecutor | None = None

    def begin(self, params: StructuredOutputsParams) -> "Future[Grammar]":
        """Starts to compile a grammar, unless it is there or under way. Returns at once.

        The future raises what `Grammar` does. Several may wait for it, so nobody should cancel it.
        """
        with self._lock:
            if params not in self._kept:
                if self._threads is None:
                    self._threads, self._renewing = _deep_threads(THREADS), _deep_threads(1)
                self._kept[params] = self._threads.submit(self._compile, params)
            self._kept.move_to_end(params)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return self._kept[params]

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar; waits for it.

        Raises:
            ValueError: it cannot be compiled, or not in time; the message names the constraint.
        """
        future = self.begin(params)
        try:
            return future.result(COMPILE_SECONDS)
        except TimeoutError:
            raise ValueError(LATE.format(params.constraint)) from None

    def close(self) -> None:
        """Forgets all grammars."""
        with self._lock:
            self._kept.clear()
            for threads in (self._threads, self._renewing):
                if threads is not None:
                    threads.shutdown(wait=False, cancel_futures=True)
            self._threads = self._renewing = None

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        with self._making:
            if self._tokens is None:
                self._tokens = self._make_tokens()
        return Grammar(self._tokens, params, self._renewing)


def _deep_threads(count: int) -> ThreadPoolExecutor:
    """Threads whose stacks hold the recursion of the largest grammar; past its end a process dies."""
    threads = ThreadPoolExecutor(count, thread_name_prefix="grammar")
    all_there = threading.Barrier(count)
    before = threading.stack_size(STACK_BYTES)
    try:
        for started in [threads.submit(all_there.wait) for _ in range(count)]:
            started.result()
    finally:
        threading.stack_size(before)
    return threads
