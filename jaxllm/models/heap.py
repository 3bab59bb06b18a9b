"""Memory that the C library keeps of what has been freed."""

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function; None where the C library has none.

    Source: https://man7.org/linux/man-pages/man3/malloc_trim.3.html
    """
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows wants a name
        return None
    function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_int
    return function


def give_back() -> None:
    """Returns freed memory of all threads to the operating system; does nothing where it cannot be asked to.

    glibc keeps what a thread has freed for that thread: 217 MB after the demo model was loaded by four
    threads and its programs by two. Python's lock is released meanwhile.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
