"""The FastAPI application over a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from lifecycle import __version__
from serving.auth import ApiKeys, RequireKey
from serving.handlers import add_handlers
from serving.middleware import LimitBody, RequestContext
from serving.routes import adapters, chat, completions, health, metrics, models
from serving.service import Service
from serving.settings import ServerSettings


def create_app(service: Service, settings: ServerSettings | None = None) -> FastAPI:
    """An application that answers with one service; its start and end are the service's."""
    settings = settings or ServerSettings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.close()

    app = FastAPI(
        title="lifecycle",
        version=__version__,
        lifespan=lifespan,
        # The interactive pages would load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service, app.state.settings = service, settings
    for module in (health, metrics, models, chat, completions):
        app.include_router(module.router)
    if settings.adapter_root is not None:
        app.include_router(adapters.router)
    add_handlers(app)
    _add_middleware(app, settings)
    return app


def _add_middleware(app: FastAPI, settings: ServerSettings) -> None:
    """From the innermost to the outermost."""
    app.add_middleware(LimitBody, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout)
    keys, admins = ApiKeys(settings.api_keys), ApiKeys(settings.admin_keys)
    app.add_middleware(RequireKey, keys=keys, admins=admins)
    if settings.allowed_origins:
        # Outside the keys: a browser asks without a key whether it may ask with one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            # Any, for the official client sends a dozen of its own with each request.
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-should-retry"],
        )
    app.add_middleware(RequestContext)
