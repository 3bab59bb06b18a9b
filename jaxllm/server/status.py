"""Whether the server lives and serves, and what."""

from typing import NotRequired

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response
from typing_extensions import TypedDict

import jaxllm
from jaxllm.server.service import Served, Service, Status

router = APIRouter()


class ModelCard(TypedDict):
    """https://platform.openai.com/docs/api-reference/models/object, with vLLM's additions."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None


class ModelList(TypedDict):
    """What is served."""

    object: str
    data: list[ModelCard]


class Health(TypedDict):
    """Whether the server can serve, and if not, why; of several replicas, how many do."""

    status: Status
    replicas: NotRequired[int]
    replicas_serving: NotRequired[int]


class Readiness(Health):
    """And while it loads, how far it is; times are in seconds."""

    seconds: NotRequired[float]
    done: NotRequired[dict[str, float]]
    programs: NotRequired[int]
    programs_compiled: NotRequired[int]
    seconds_left: NotRequired[float]


class Load(TypedDict):
    """Requests for text that have not been answered to the end."""

    server_load: int


class Version(TypedDict):
    """The version of jaxllm."""

    version: str


@router.get("/health", response_model=Health)
async def health(service: Served) -> Response:
    """Whether the process is of use: 200, also while it loads; 503 when the engine has failed."""
    status = service.status
    body = {"status": status, **_replicas(service)}
    return JSONResponse(body, 503 if status in ("failed", "restarting") else 200)


@router.get("/ping", response_model=Health)
@router.post("/ping", response_model=Health)
async def ping(service: Served) -> Response:
    """As `/health`; some platforms ask here."""
    return await health(service)


@router.get("/ready", response_model=Readiness)
async def ready(service: Served) -> Response:
    """Whether requests are served now: 200, or 503 with how far loading is."""
    status = service.status
    body = {"status": status, **_replicas(service), **service.progress()}
    return JSONResponse(body, 200 if status == "ready" else 503)


@router.get("/version")
async def version() -> Version:
    """The version of jaxllm."""
    return {"version": jaxllm.__version__}


@router.get("/load")
async def load(service: Served) -> Load:
    """Requests for text that have not been answered to the end."""
    return {"server_load": service.requests}


@router.get("/v1/models", response_model=ModelList)
async def models(service: Served) -> ModelList:
    """The names under which the model is served."""
    return {"object": "list", "data": [_card(service, name) for name in service.names]}


@router.get("/v1/models/{model:path}", response_model=ModelCard)
async def model(model: str, service: Served) -> ModelCard:
    """One of them."""
    return _card(service, service.model_name(model))


def _replicas(service: Service) -> dict[str, int]:
    """Where there are several replicas, how many, and how many of them serve."""
    engine = service.loaded_engine
    if engine is None or (total := len(engine.replica_metrics)) == 1:  # data groups are one replica
        return {}
    return {"replicas": total, "replicas_serving": engine.num_serving}


def _card(service: Service, name: str) -> ModelCard:
    engine = service.loaded_engine
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "jaxllm",
        "root": service.engine_config.model.model,
        "parent": None,
        "max_model_len": engine.max_model_len if engine is not None else None,
    }
