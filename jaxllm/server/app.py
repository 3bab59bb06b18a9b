"""The server's endpoints put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import GCCollector, ProcessCollector
from starlette.middleware.cors import CORSMiddleware

import jaxllm
from jaxllm.server import (
    admin,
    chat,
    completions,
    errors,
    live,
    messages,
    metrics,
    openapi,
    page,
    responses,
    status,
    tokenization,
    unserved,
)
from jaxllm.server.http_metrics import HttpMetrics
from jaxllm.server.keys import METRICS, KeyMiddleware, Keys
from jaxllm.server.middleware import RequestMiddleware, RootPathMiddleware, SizeMiddleware
from jaxllm.server.rate_limits import RATE_LIMIT_HEADERS, RateLimitMiddleware
from jaxllm.server.service import Service


def create_app(service: Service, keys: Keys) -> FastAPI:
    """The ASGI application. The model is loaded when it starts, and let go of when it stops.

    Args:
        service: what the endpoints share.
        keys: those that clients may come with; if there are none, nobody needs one.
    """
    config = service.config

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.load()
        yield
        await service.close()

    app = FastAPI(
        title="jaxllm",
        version=jaxllm.__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    service.registry.register(metrics.EngineCollector(service))
    ProcessCollector(registry=service.registry)
    GCCollector(registry=service.registry)
    errors.install(app)
    for part in (status, completions, chat, responses, messages, tokenization, metrics, unserved):
        app.include_router(part.router)
    if config.access.admin:
        app.include_router(admin.router)
    if config.access.ui:
        app.include_router(live.router)  # before the page's files, which are in the same folder
        app.include_router(page.router)
    openapi.install(app)
    # the last one added is the first to see a request
    app.add_middleware(
        SizeMiddleware,
        max_header_bytes=config.listen.h11_max_incomplete_event_size,
        max_body_bytes=config.limits.max_body_bytes,
    )
    if config.limits.is_rate_limited:
        app.add_middleware(
            RateLimitMiddleware,
            requests=config.limits.rate_limit_requests,
            tokens=config.limits.rate_limit_tokens,
            root_path=config.listen.root_path,
        )
    if keys:
        app.add_middleware(
            KeyMiddleware,
            keys=keys,
            root_path=config.listen.root_path,
            exempt=(
                *((METRICS,) if config.access.metrics_without_key else ()),
                *(page.page_files() if config.access.ui else ()),
            ),
        )
    if config.listen.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.listen.allowed_origins,
            allow_methods=["GET", "POST", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", *RATE_LIMIT_HEADERS],
        )
    log = not config.log.disable_log_requests
    app.add_middleware(RequestMiddleware, metrics=HttpMetrics(service.registry), log=log)
    if config.listen.root_path:
        app.add_middleware(RootPathMiddleware, root_path=config.listen.root_path)
    return app
