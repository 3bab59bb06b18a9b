"""For whoever runs the server: only there with `--admin`."""

import asyncio
from typing import Literal

from fastapi import APIRouter
from typing_extensions import TypedDict

from jaxllm.engine.async_engine import AsyncEngine
from jaxllm.server.errors import ApiError, unavailable
from jaxllm.server.service import Served, Service
from jaxllm.server.status import Health

router = APIRouter()


class Done(TypedDict):
    """It has been done."""

    status: Literal["ok"]


class Profile(TypedDict):
    """A profile, and the folder that it is written to."""

    status: Literal["recording", "written"]
    folder: str


class IsSleeping(TypedDict):
    """Whether the engine sleeps."""

    is_sleeping: bool


DRAIN_SECONDS = 0.05
"""How often it is looked whether the last request has ended."""


@router.post("/sleep")
async def sleep(service: Served, level: int = 1) -> Health:
    """Gives the device's memory back, once nothing runs: level 1 keeps the weights in the host's memory."""
    if level not in (1, 2):
        raise ApiError(400, f"level={level}: must be 1 or 2", param="level")
    if service.active:
        text = f"{service.active} outputs are being made; wait for them, or end them"
        raise ApiError(409, text, code="busy", headers={"Retry-After": "1"})
    engine = service.engine
    await _idle(engine)
    await engine.sleep(level)
    return {"status": service.status}


@router.post("/wake_up")
async def wake_up(service: Served) -> Health:
    """Takes the device's memory again."""
    await _engine(service).wake_up()
    return {"status": service.status}


@router.get("/is_sleeping")
async def is_sleeping(service: Served) -> IsSleeping:
    """Whether the engine sleeps."""
    return {"is_sleeping": service.status == "sleeping"}


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(service: Served) -> Done:
    """Forgets all cached prefixes; 409 while requests are running, which may use them."""
    engine = service.engine
    if not await engine.reset_prefix_cache():
        raise ApiError(409, "requests are running; nothing was forgotten", code="busy")
    return {"status": "ok"}


@router.post("/start_profile")
async def start_profile(service: Served) -> Profile:
    """Begins to record a profile of host and devices; needs `--profile-dir`."""
    return {"status": "recording", "folder": str(await service.profiler.start())}


@router.post("/stop_profile")
async def stop_profile(service: Served) -> Profile:
    """Ends it and writes it to the folder."""
    return {"status": "written", "folder": str(await service.profiler.stop())}


def _engine(service: Service) -> AsyncEngine:
    engine = service.loaded_engine
    if engine is None:
        raise unavailable("the model is being loaded; /ready says how far it is", retry_after=5)
    return engine


async def _idle(engine: AsyncEngine) -> None:
    """Waits until requests that were given up have left the engine, which takes a step."""
    while engine.get_metrics()["requests_running"] or engine.get_metrics()["requests_waiting"]:
        await asyncio.sleep(DRAIN_SECONDS)
