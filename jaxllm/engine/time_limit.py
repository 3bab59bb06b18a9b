"""A bound on how long Python code may run that somebody else wrote."""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class OutOfTimeError(BaseException):
    """The code ran too long. No `Exception`, so that what it calls does not take it for one of its own."""


def within(seconds: float, function: Callable[[], T]) -> T:
    """Calls a function, and has it raise when it takes too long.

    It is stopped between two steps of the interpreter; a single call into C is not.
    https://docs.python.org/3/c-api/threads.html#c.PyThreadState_SetAsyncExc

    Raises:
        TimeoutError: it took longer than `seconds`.
    """
    thread, lock = threading.get_ident(), threading.Lock()
    done = raised = False

    def stop() -> None:
        nonlocal raised
        with lock:
            if not done:
                raised = True
                error = ctypes.py_object(OutOfTimeError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    try:
        timer.start()
        try:
            return function()
        finally:
            with lock:
                done = True
            timer.cancel()
            if raised:
                time.sleep(0.001)  # if the error has not come yet, it does here
    except OutOfTimeError:
        raise TimeoutError(f"it took longer than {seconds:g} s") from None
