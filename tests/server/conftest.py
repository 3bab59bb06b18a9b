"""One server for all tests that do not need one of their own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.append(str(Path(__file__).parent.parent / "engine"))  # its small checkpoints

import scripted
from running import Running, running
from small_text import text_checkpoint

from jaxllm.engine import restarts

if TYPE_CHECKING:  # only `make ui` has playwright
    from browser import Screen
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that has text and chats."""
    return text_checkpoint(tmp_path_factory.mktemp("server") / "model")


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Running]:
    """The server."""
    options = {"served_model_name": ("tiny", "small"), "admin": True, "vllm_metrics": True}
    with (
        pytest.MonkeyPatch.context() as patch,
        running(
            model,
            **options,
            max_engine_restarts=1000,
            max_num_queued_reqs=58,
            max_body_bytes=100_000,
            max_outputs=16,
        ) as found,
    ):
        patch.setattr(restarts, "FIRST_PAUSE", 0.0)  # tests have it start over again and again
        yield found


@pytest.fixture(scope="session")
def tool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server for calls of tools and reasoning, whose answers tests can write."""
    with scripted.tool_server(tmp_path_factory.mktemp("tools") / "model") as found:
        yield found


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """Chromium, for all tests of the page."""
    from browser import open_browser

    with open_browser() as found:
        yield found


@pytest.fixture
def screen(browser: "Browser", server: Running) -> "Iterator[Screen]":
    """The page, open in a wide window. Nothing may have gone wrong in it at the end."""
    from browser import Screen

    found = Screen(browser, server.url).open()
    found.status("ready")
    yield found
    problems = list(found.problems)
    found.close()
    server.wait_idle()
    assert problems == []
