"""Grammars are tested on the small tokenizers of the engine's tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "engine"))
