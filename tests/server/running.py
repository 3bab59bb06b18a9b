"""A server on a free port of 127.0.0.1, in a thread, with a tiny random model."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai

from jaxllm.config import EngineConfig
from jaxllm.server.config import PARTS, ServerConfig
from jaxllm.server.run import make_server
from jaxllm.server.service import Service

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "page_size": 4,
    "num_pages": 200,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 32,
    "compilation_cache": False,  # the tests' own folder stays in force
    "progress": False,
}


def server_config(**options: Any) -> ServerConfig:
    """A config from flat options."""
    parts = {
        name: part(**{key: value for key, value in options.items() if key in part.__dataclass_fields__})
        for name, part in PARTS.items()
    }
    return ServerConfig(**parts)


@dataclass
class Running:
    """A server that serves."""

    url: str
    service: Service
    app: Any
    """The ASGI application, to be called without a socket."""
    opened: list[Any] = field(default_factory=list)

    @property
    def http(self) -> httpx2.Client:
        """A plain client."""
        return self._keep(httpx2.Client(base_url=self.url, timeout=30))

    @property
    def openai(self) -> openai.OpenAI:
        """OpenAI's client."""
        return self._keep(openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0))

    def post(self, path: str, **body: Any) -> httpx2.Response:
        """Sends JSON."""
        return self.http.post(path, json=body)

    def figures(self) -> dict[str, float]:
        """What the engine counts."""
        engine = self.service.loaded_engine
        assert engine is not None
        return engine.get_metrics()

    def wait_idle(self, seconds: float = 20) -> None:
        """Waits until nothing runs and nothing waits."""
        end = time.monotonic() + seconds
        while self.service.active or any(
            self.figures()[f"requests_{state}"] for state in ("running", "waiting")
        ):
            assert time.monotonic() < end, "the server is not idle"
            time.sleep(0.01)

    def _keep(self, client: Any) -> Any:
        self.opened.append(client)
        return client


@contextlib.contextmanager
def running(model: Path, **options: Any) -> Iterator[Running]:
    """Starts a server, waits until it is ready, and stops it at the end."""
    engine = EngineConfig.create(str(model), **ENGINE, **options.pop("engine", {}))
    server, service = make_server(server_config(port=0, **options), engine)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started or service.status == "loading":
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.01)
        where = server.servers[0].sockets[0].getsockname()
        url = f"http://127.0.0.1:{where[1]}" if isinstance(where, tuple) else f"unix:{where}"
        found = Running(url, service, server.config.app)
        yield found
        for client in found.opened:
            client.close()
    finally:
        server.should_exit = True
        thread.join()
