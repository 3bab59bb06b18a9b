"""One server for the libraries that people ask servers with."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "engine"))  # its small checkpoints
sys.path.append(str(Path(__file__).parent.parent / "server"))  # its servers

import scripted
from running import Running

if any(
    find_spec(name) is None
    for name in ("anthropic", "instructor", "langchain_openai", "litellm", "pydantic_ai")
):
    collect_ignore_glob = [
        "test_*"
    ]  # elsewhere than in .venv-clients; there, having no tests would be an error


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server for calls of tools and reasoning, whose answers tests can write."""
    with scripted.tool_server(tmp_path_factory.mktemp("clients") / "model") as found:
        yield found


@pytest.fixture(scope="session")
def url(server: Running) -> str:
    """Where OpenAI's interface is."""
    return f"{server.url}/v1"
