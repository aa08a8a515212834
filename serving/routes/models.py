"""What is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from serving.errors import model_not_found
from serving.routes.generate import service_of
from serving.service import Service

router = APIRouter(prefix="/v1/models")


@router.get("")
async def list_models(request: Request) -> dict[str, Any]:
    """The one model of this server."""
    return {"object": "list", "data": [_model(service_of(request))]}


@router.get("/{name:path}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """A model by its name, which may contain slashes."""
    service = service_of(request)
    if name != service.card.name:
        raise model_not_found(name, service.card.name)
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.card.name,
        "object": "model",
        "created": service.card.created,
        "owned_by": "lifecycle",
        "max_model_len": service.max_model_len,
        "gated": service.card.gated,
    }
