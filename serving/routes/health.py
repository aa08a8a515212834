"""How the server is: for probes, so without a key."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from lifecycle import __version__
from serving.routes.generate import service_of

router = APIRouter()


@router.get("/livez")
async def livez(request: Request) -> JSONResponse:
    """200 as long as the engine can work; otherwise the server must be restarted."""
    return _status(service_of(request).worker.alive, "alive", "engine stopped")


@router.get("/health")
@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """200 as long as new requests are taken."""
    return _status(service_of(request).worker.ready, "ready", "not ready")


@router.get("/version")
async def version() -> JSONResponse:
    """The version of lifecycle."""
    return JSONResponse({"version": __version__})


def _status(good: bool, yes: str, no: str) -> JSONResponse:
    return JSONResponse({"status": yes if good else no}, 200 if good else 503)
