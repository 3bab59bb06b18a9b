"""From the start of a process to its first token, with nothing kept from before and with all of it."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMPORT_ROUNDS = 3
IMPORT = "import time; t = time.perf_counter(); import jaxllm; print(time.perf_counter() - t)"


def measure(model: str, options: Mapping[str, Any], *, rounds: int, prompt_len: int = 128) -> dict[str, Any]:
    """Starts a process with an empty cache folder, and then `rounds` more with what the first has left there.

    The folder is a temporary one and takes the place of the user's own, for compiled programs and kernels;
    models are found where they always are.

    Raises:
        RuntimeError: a process failed; the message ends with what it said.
    """
    imports = [float(_python(["-c", IMPORT], dict(os.environ))) for _ in range(IMPORT_ROUNDS)]
    with tempfile.TemporaryDirectory(prefix="jaxllm-startup-") as folder:
        runs = [_start(model, options, Path(folder), prompt_len) for _ in range(rounds + 1)]
    cold, warm = runs[0], runs[1:]
    return {
        "model": model,
        "import_seconds": statistics.median(imports),
        "cold_seconds": cold["seconds"],
        "warm_seconds": {
            "best": min(run["seconds"] for run in warm),
            "median": statistics.median(run["seconds"] for run in warm),
            "all": [run["seconds"] for run in warm],
        },
        "cold": cold,
        "warm": min(warm, key=lambda run: run["seconds"]),
    }


def _start(model: str, options: Mapping[str, Any], folder: Path, prompt_len: int) -> dict[str, Any]:
    environment = dict(os.environ)
    environment.setdefault("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    environment["XDG_CACHE_HOME"] = str(folder)
    own = {"progress": False, "compilation_cache": True, "compilation_cache_dir": str(folder / "programs")}
    request = {
        "model": model,
        "options": {**{name: _plain(value) for name, value in options.items()}, **own},
        "prompt_len": prompt_len,
        "started": time.monotonic(),
    }
    return json.loads(_python(["-m", "jaxllm.bench.first_token", json.dumps(request)], environment))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _python(arguments: list[str], environment: dict[str, str]) -> str:
    """The last line that a Python process prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the process that was measured failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]
