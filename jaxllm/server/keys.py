"""API keys: who may ask.

A key is asked for on every path but those that are named here. What counts is the path as it came over the
wire, not as it was decoded: whoever writes it in another way needs a key.
"""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxllm.server.config import AccessConfig
from jaxllm.server.errors import ApiError

EXEMPT = frozenset({"/health", "/ready", "/ping"})
"""Paths that need no key: probes have none."""
METRICS = "/metrics"


class Keys:
    """The keys that are taken. Only their hashes are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_hash(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def __contains__(self, key: bytes) -> bool:
        """Whether a key is one of them; takes the same time wherever they differ, and whichever it is."""
        given, found = _hash(key), False
        for known in self._hashes:
            found |= hmac.compare_digest(given, known)
        return found


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_key_file(path: Path) -> list[str]:
    """Keys from a file: one on each line, without blank lines and those that begin with #.

    Raises:
        OSError: it cannot be read.
        ValueError: it has none.
    """
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"api_key_file={str(path)!r}: there is no key in it")
    return keys


def make_keys(access: AccessConfig) -> Keys:
    """The keys that clients may come with, those of the file among them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has none, or there are none where each is to have a prefix cache of its own.
    """
    keys = list(access.api_key)
    if access.api_key_file is not None:
        keys += read_key_file(access.api_key_file)
    if access.cache_salt_per_key and not keys:
        raise ValueError("cache_salt_per_key: there are no keys; give some, or leave it out")
    return Keys(keys)


class KeyMiddleware:
    """Answers 401 to requests without a key: `Authorization: Bearer KEY`, or `X-Api-Key: KEY`.

    The key's hash goes on with the request, as `key_hash` in its state.

    Args:
        exempt: paths that need no key besides `EXEMPT`, each spelled out.
    """

    def __init__(self, app: ASGIApp, keys: Keys, *, root_path: str = "", exempt: Iterable[str] = ()) -> None:
        self._app, self._keys = app, keys
        self._exempt = frozenset((root_path + path).encode() for path in (*EXEMPT, *exempt))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "http" and scope.get("raw_path") not in self._exempt:
            key = _given(scope["headers"])
            if key is None or key not in self._keys:
                text = "no valid API key: send the header 'Authorization: Bearer KEY'"
                error = ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await error.response(scope["path"])(scope, receive, send)
                return
            scope.setdefault("state", {})["key_hash"] = _hash(key).hex()
        await self._app(scope, receive, send)


def _given(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key that a request came with; None if it has none, or several."""
    found = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            found.append(key.strip() if scheme.lower() == b"bearer" else b"")
        elif name == b"x-api-key":
            found.append(value.strip())
    return found[0] if len(set(found)) == 1 and found[0] else None
