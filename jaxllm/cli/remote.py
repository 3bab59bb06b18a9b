"""What the commands that talk to a server share: where it is, and its answers."""

import argparse
import json
import os
from collections.abc import Generator, Mapping
from typing import Any

import httpx2

from jaxllm.wording import refusal, unreachable

KEY_VARIABLES = ("JAXLLM_API_KEY", "OPENAI_API_KEY")
"""Environment variables with a key, in the order in which they are looked at."""

NOT_ASKED = ("logits_processors", "extra_args", "skip_reading_prefix_cache")
"""Sampling parameters that servers do not take."""


def add_server_flags(parser: argparse.ArgumentParser, *, url_default: str | None = None) -> None:
    """`--url`, `--model-name` and `--api-key`."""
    group = parser.add_argument_group("server")
    default = "" if url_default is None else f" (default: {url_default})"
    text = f"ask the server at this address, such as http://127.0.0.1:8000{default}"
    group.add_argument("--url", type=_address, default=url_default, metavar="URL", help=text)
    group.add_argument("--model-name", metavar="NAME", help="the model's name there (default: the first)")
    group.add_argument("--api-key", metavar="KEY", help=f"(default: that in {' or '.join(KEY_VARIABLES)})")


def _address(text: str) -> str:
    """Where a server is, without /v1, as argparse reads it."""
    if not text.lower().startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} has to begin with http:// or https://")
    return text.rstrip("/").removesuffix("/v1")


def server_headers(arguments: argparse.Namespace) -> dict[str, str]:
    """The key to come with, if there is one; the first where a variable has several."""
    from_environment = (os.environ.get(name) for name in KEY_VARIABLES)
    key = (arguments.api_key or next(filter(None, from_environment), "")).split(",")[0].strip()
    return {"authorization": f"Bearer {key}"} if key else {}


class Remote:
    """A server as OpenAI's clients see it. To be used in a `with` statement.

    Args:
        url: where it is, without /v1.
        model: the name to ask for; None: the server's first.
        headers: of every request.
    """

    def __init__(self, url: str, model: str | None, headers: Mapping[str, str]) -> None:
        self._client = httpx2.Client(base_url=url, headers=headers, timeout=600)
        self._model = {} if model is None else {"model": model}

    @property
    def model(self) -> str:
        """The model's name.

        Raises:
            RuntimeError: the server cannot be reached, or refuses.
        """
        if not self._model:
            try:
                response = self._client.get("/v1/models")
            except httpx2.HTTPError as error:
                raise self._lost(error) from error
            _check(response)
            self._model = {"model": response.json()["data"][0]["id"]}
        return self._model["model"]

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The chunks of an answer. Who stops reading closes the generator, and the server ends the request.

        Raises:
            ValueError: the server refuses the request; the message is its own.
            RuntimeError: it cannot be reached, or the answer breaks off.
        """
        whole = {"model": self.model, **body, "stream": True}
        try:
            with self._client.stream("POST", path, json=whole) as response:
                if not response.is_success:
                    response.read()
                _check(response)
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            raise RuntimeError(chunk["error"]["message"])
                        yield chunk
        except httpx2.HTTPError as error:
            raise self._lost(error) from error

    def _lost(self, error: httpx2.HTTPError) -> RuntimeError:
        url = str(self._client.base_url)
        if isinstance(error, httpx2.ConnectError):
            return RuntimeError(unreachable(url, error))
        return RuntimeError(f"{url}: {error}")

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()


def _check(response: httpx2.Response) -> None:
    """Raises what the server says is wrong."""
    if response.is_success:
        return
    kind = ValueError if response.status_code == 400 else RuntimeError
    raise kind(f"{response.status_code}: {refusal(response.text)}")
