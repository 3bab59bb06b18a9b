"""The server as a Ray Serve application: replicas on the nodes of a cluster, as many as the load asks for.

    serve run jaxllm.server.ray_serve:build_app model=smollm2-135m-instruct min_replicas=1 max_replicas=4

A front reads each request, and sends it to a replica near its prefix; see `PrefixRouter`. The replicas serve
all of the server's endpoints. Each has an engine, on the devices of its node.

https://docs.ray.io/en/latest/serve/index.html
"""

import dataclasses
import json
import os
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jaxllm.config import EngineConfig
from jaxllm.server import logs
from jaxllm.server.app import create_app
from jaxllm.server.asgi_call import call_app
from jaxllm.server.config import PARTS, ServerConfig
from jaxllm.server.keys import make_keys
from jaxllm.server.prompt_names import prompt_names
from jaxllm.server.service import Service

TRIES = 2
"""Times that a request is sent to a replica: once more if that dies before it has answered."""
_AUTOSCALING = ("min_replicas", "max_replicas", "target_ongoing_requests", "look_back_period_s",
                "metrics_interval_s", "upscale_delay_s", "downscale_delay_s")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ReplicaOptions:
    """How many replicas there are, and what each of them takes."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: int = 32
    """Requests a replica, above which there come to be more replicas."""
    max_ongoing_requests: int = 256
    """Requests that a replica takes at a time; others wait for it in the front."""
    look_back_period_s: float = 30.0
    """Seconds whose mean number of requests counts."""
    metrics_interval_s: float = 10.0
    """Seconds after which they are counted again."""
    upscale_delay_s: float = 30.0
    """Seconds that there have to be too many before replicas are added."""
    downscale_delay_s: float = 600.0
    """Seconds that there have to be too few before replicas are taken away."""
    resources: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"CPU": 1.0})
    """What Ray reserves for each, such as {"TPU": 4}, {"GPU": 1}."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas}: must be 1 to max_replicas={self.max_replicas}"
            )
        for name in ("target_ongoing_requests", "max_ongoing_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("look_back_period_s", "metrics_interval_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be more than 0 seconds")
        for name in ("upscale_delay_s", "downscale_delay_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 seconds")

    @property
    def autoscaling(self) -> dict[str, float]:
        """Ray's `AutoscalingConfig`, whose names these are."""
        return {name: getattr(self, name) for name in _AUTOSCALING}


class Replica:
    """One engine with all of the server's endpoints, behind the front.

    Raises:
        Exception: the model cannot be loaded.
    """

    async def __init__(self, config: ServerConfig, engine_config: EngineConfig) -> None:  # pyright: ignore[reportGeneralTypeIssues]  # Ray Serve waits for it
        logs.configure(config.log)
        self._service = Service(config, engine_config)
        self._app = create_app(self._service, make_keys(config.access))
        self._service.load()
        await self._service.wait_loaded()

    async def answer(
        self, names: tuple[bytes, ...], scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[Any, None]:
        """The ASGI messages that answer a request.

        Args:
            names: of its prompt's beginning, which the router has read.
        """
        async for message in call_app(self._app, scope, body):
            yield message

    async def check_health(self) -> None:
        """Has Ray Serve start the replica again once its engine has failed."""
        if self._service.status == "failed":
            raise RuntimeError("the engine has failed")

    async def __del__(self) -> None:
        await self._service.close()


class Front:
    """Takes requests over HTTP, and passes them on with names for their prompts.

    Args:
        replicas: the deployment of replicas.
        max_body_bytes: of a request.
    """

    def __init__(self, replicas: Any, max_body_bytes: int) -> None:
        self._replicas = replicas.options(stream=True, method_name="answer")
        self._most = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answers as a replica does."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._most:
                break  # the replica refuses it, by the same limit
        scope = {key: request.scope[key] for key in _SCOPE if key in request.scope}
        for left in reversed(range(TRIES)):
            messages = self._replicas.remote(prompt_names(bytes(body)), scope, bytes(body))
            try:
                start = await anext(messages)
                break
            except RayActorError:
                if not left:
                    return JSONResponse(_GONE, 503, {"retry-after": "5"})
        answer = StreamingResponse(_chunks(messages), start["status"])
        answer.raw_headers = list(start["headers"])
        return answer


_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path",
          "headers", "client", "server")  # fmt: skip
_GONE = {"error": {"message": "the replicas are being started again; try again", "type": "server_error"}}


async def _chunks(messages: Any) -> AsyncGenerator[bytes, None]:
    async for message in messages:
        yield message.get("body", b"")


def build_app(arguments: Mapping[str, Any]) -> serve.Application:
    """The application, from flat arguments: `model`, options of engine and server, and `ReplicaOptions`.

    Values may be texts, as `serve run` gives them. Keys come from the environment as well, as for `jaxllm
    serve`: from that of the process that calls this, since those of the replicas have another.

    Raises:
        TypeError: an argument that there is not.
        ValueError: `model` is missing, or a value out of range.
    """
    values = {name: _value(value) for name, value in arguments.items()}
    if "model" not in values:
        raise ValueError("model: is missing; give it as model=NAME")
    own = {name: values.pop(name) for name in _names_of(ReplicaOptions) if name in values}
    options = ReplicaOptions(**own)
    parts = {
        name: part(**{key: values.pop(key) for key in _names_of(part) if key in values})
        for name, part in PARTS.items()
        if name != "listen"  # Ray Serve does that
    }
    config = ServerConfig(**parts)
    config = dataclasses.replace(config, access=config.access.with_keys_of(os.environ))
    engine_config = EngineConfig.create(str(values.pop("model")), **{"progress": False, **values})
    if engine_config.parallel.num_hosts != 1:
        raise ValueError("num_hosts: a replica is on one node here; leave it out")
    replica = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=options.max_ongoing_requests,
        autoscaling_config=options.autoscaling,
        request_router_config=RequestRouterConfig(
            request_router_class="jaxllm.server.ray_router.PrefixRouter",
            request_router_kwargs={"rows": options.target_ongoing_requests},
        ),
        ray_actor_options=_actor_options(options.resources),
        graceful_shutdown_timeout_s=config.limits.shutdown_timeout,
    )
    front = serve.deployment(
        Front, name="Front", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(replica.bind(config, engine_config), config.limits.max_body_bytes)


def _names_of(part: type) -> list[str]:
    return [field.name for field in dataclasses.fields(part)]


def _value(value: Any) -> Any:
    """What a text says, if it is JSON; else the text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    rest = dict(resources)
    return {"num_cpus": rest.pop("CPU", 0), "num_gpus": rest.pop("GPU", 0), "resources": rest}
