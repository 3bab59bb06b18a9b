"""Code that runs too long is stopped, and code that does not is left alone."""

import threading
import time

import pytest

from jaxllm.engine.time_limit import within


def forever() -> None:
    while True:
        try:
            while True:
                pass
        except Exception:  # it may try to go on
            continue


def test_in_time() -> None:
    assert within(5, lambda: 7) == 7
    with pytest.raises(ValueError, match="own"):
        within(5, lambda: int("own"))
    end = time.monotonic() + 5
    while any(isinstance(thread, threading.Timer) for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.001)


def test_too_long() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"longer than 0\.05 s"):
        within(0.05, forever)
    assert time.monotonic() - begin < 5


def test_at_the_very_end() -> None:
    """An error that is sent just as the code ends does not come later."""
    for step in range(200):
        seconds = 0.001 + step * 1e-6
        try:
            within(seconds, lambda seconds=seconds: time.sleep(seconds))
        except TimeoutError:
            continue
    sum(range(10**5))
