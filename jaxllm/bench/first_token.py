"""A fresh process that loads a model and generates one token; `jaxllm.bench.startup` starts it.

    python -m jaxllm.bench.first_token '{"model": "...", "options": {...}, "started": 12.5}'

`started` is when the process was asked for, on the clock of `time.monotonic`, which all processes share. It
prints a JSON object with the seconds of each phase, in order, and what the compiler did.
"""

# ruff: noqa: E402 -- the clock is read before anything else is imported
import time

_BEGIN = time.monotonic()

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PROMPT_LEN = 128
_FOLDERS = ("cache_dir", "compilation_cache_dir")


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Loads the model and generates a token."""
    phases = {"interpreter": _BEGIN - request["started"]}
    last = _BEGIN

    def lap(name: str) -> None:
        nonlocal last
        now = time.monotonic()
        phases[name], last = now - last, now

    importlib.import_module("jaxllm")
    lap("import_jaxllm")
    importlib.import_module("jax")
    lap("import_jax")
    session = importlib.import_module("jaxllm.bench.session")
    workload = importlib.import_module("jaxllm.bench.workload")
    lap("import_engine")
    compiler = _watch_compiler()
    options = request["options"] | {
        name: Path(folder) for name, folder in request["options"].items() if name in _FOLDERS
    }
    with session.Session(request["model"], wait=False, **options) as run:
        lap("load")
        load, rest = dict(run.parts.load_seconds), phases.pop("load")
        phases.update(load)
        phases["load_other"] = rest - sum(load.values())
        prompt = workload.single(run.vocab_size, request.get("prompt_len", PROMPT_LEN))
        lap("prompt")
        run.generate([prompt], 1)
        lap("first_token")
        run.engine.wait_for_programs()  # so that a later start finds all of them
        about = run.about()
    return {
        "seconds": sum(phases.values()),
        "phases": phases,
        "compiler": dict(compiler),
        "programs": about["programs"],
        "programs_loaded": about["programs_loaded"],
        "programs_compiled_late": about["programs_compiled_late"],
        "memory_bytes": about["memory_bytes"],
    }


def _watch_compiler() -> Counter[str]:
    """Sums what jax reports of all threads: seconds of tracing, lowering, compiling, and its cache's hits."""
    import jax.monitoring

    names = {
        "/jax/core/compile/jaxpr_trace_duration": "tracing_seconds",
        "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering_seconds",
        "/jax/core/compile/backend_compile_duration": "compile_or_read_seconds",
        "/jax/compilation_cache/cache_hits": "cache_hits",
        "/jax/compilation_cache/cache_misses": "cache_misses",
    }
    found: Counter[str] = Counter()

    def duration(event: str, duration_secs: float, **_: Any) -> None:
        if event in names:
            found[names[event]] += duration_secs  # pyright: ignore[reportArgumentType]

    def happened(event: str, **_: Any) -> None:
        if event in names:
            found[names[event]] += 1

    jax.monitoring.register_event_duration_secs_listener(duration)
    jax.monitoring.register_event_listener(happened)
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
