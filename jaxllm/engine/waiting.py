"""Shows that something is under way which does not tell how far it has come."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

UNNOTICED = 0.5
"""Seconds that nobody minds; nothing is shown before."""


@contextmanager
def waiting(what: str, *, progress: bool) -> Iterator[None]:
    """Shows how long the block has taken, on stderr, for as long as it takes."""
    done = threading.Event()

    def show() -> None:
        if done.wait(UNNOTICED):
            return
        with tqdm(desc=what, bar_format="{desc}: {elapsed}") as bar:
            while not done.wait(UNNOTICED):
                bar.refresh()

    thread = threading.Thread(target=show, name="waiting", daemon=True)
    if progress:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if progress:
            thread.join()
