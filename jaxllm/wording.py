"""Phrases that messages of several floors share."""

import difflib
import json
import os
import ssl
from collections.abc import Iterable
from itertools import chain


def counted(number: int, noun: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(nbytes: float) -> str:
    """In the unit that leaves few digits."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= one:
            return f"{nbytes / one:.2f} {unit}" if nbytes < 100 * one else f"{nbytes / one:.0f} {unit}"
    return f"{nbytes / 1e3:.0f} KB"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` for the nearest of the `known` names; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def how_to_install(extra: str) -> str:
    """What brings the packages of an extra along; jaxllm is installed from its clone."""
    return f"in the clone of jaxllm run pip install -e '.[{extra}]'"


def unreachable(url: str, error: Exception) -> str:
    """That there is no connection to a server, whichever client's error says so."""
    return f"cannot reach {url}: {_reason(error)}; is the server running?"


def refusal(text: str) -> str:
    """What is wrong, by the body of a server's answer: the message of OpenAI's errors, else how it begins."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _reason(error: Exception) -> str:
    """What the system said, which clients wrap in errors of their own."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and cause.errno:
            # asyncio puts the address in place of what the number means; a resolver's numbers are below 0
            said = os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
            return said[0].lower() + said[1:]
    return str(error) or type(error).__name__


def _causes(error: BaseException) -> list[BaseException]:
    """What an error came from, the first cause first."""
    within = (
        error.exceptions if isinstance(error, BaseExceptionGroup) else [error.__cause__ or error.__context__]
    )
    return [*chain.from_iterable(_causes(cause) for cause in within if cause is not None), error]
