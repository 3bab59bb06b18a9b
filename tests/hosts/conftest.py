"""A small model for hosts that run as processes."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "engine"))  # its small checkpoints

from small_text import text_checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that has text and chats."""
    return text_checkpoint(tmp_path_factory.mktemp("hosts") / "model")
