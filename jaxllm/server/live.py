"""`/ui/state`: what the page at `/` shows of the engine, read once a second by every page that is looked at.

It belongs to the page and changes with it; what others may rely on is `/metrics`.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from typing_extensions import TypedDict

from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.server.service import Served, Status

router = APIRouter(include_in_schema=False)

MOST_RUNS = 768
"""Most squares in the page's picture of the pool."""
GAUGES = (
    "uptime_seconds",
    "requests_running",
    "requests_waiting",
    "num_pages",
    "programs",
    "programs_pending",
)
COUNTERS = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "scheduled_tokens_total",
    "steps_total",
    "preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "programs_compiled_late_total",
)


DEFAULTS = ("temperature", "top_p", "top_k", "min_p")


class PagesView(TypedDict):
    """See `Occupancy`."""

    run: int
    used: Sequence[int]
    cached: Sequence[int]


class EngineView(TypedDict):
    """A loaded engine: its sizes, its figures as `Engine.get_metrics` names them, and its pages.

    `defaults` are the sampling parameters of requests that give none.
    """

    max_num_seqs: int
    max_model_len: int
    max_logprobs: int
    page_size: int
    defaults: dict[str, float | int]
    figures: dict[str, float]
    pages: PagesView


class StateView(TypedDict):
    """The server, and its engine once there is one."""

    status: Status
    names: list[str]
    progress: dict[str, Any]
    engine: EngineView | None


@router.get("/ui/state", response_model=None)
def state(service: Served) -> StateView:
    """How things stand. Like `/metrics` it reads what the step loop counts anyway, and holds no lock."""
    engine = service.loaded_engine
    return {
        "status": service.status,
        "names": list(service.names),
        "progress": service.progress(),
        "engine": None if engine is None else _view(engine),
    }


def _view(engine: AsyncEngine) -> EngineView:
    figures = engine.get_metrics()
    shown = {name: figures[name] for name in (*GAUGES, *COUNTERS)}
    shown["step_seconds_total"] = engine.metrics.step_time.sum
    pages = engine.page_occupancy(MOST_RUNS)
    return {
        "max_num_seqs": engine.max_num_seqs,
        "max_model_len": engine.max_model_len,
        "max_logprobs": engine.config.model.max_logprobs,
        "page_size": engine.config.cache.page_size,
        "defaults": {name: getattr(engine.default_params, name) for name in DEFAULTS},
        "figures": shown,
        "pages": {"run": pages.run, "used": pages.used, "cached": pages.cached},
    }
