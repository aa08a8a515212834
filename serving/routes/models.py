"""What is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from serving.cards import ModelCard
from serving.errors import model_not_found
from serving.routes.generate import service_of
from serving.service import Service

router = APIRouter(prefix="/v1/models")


@router.get("")
async def list_models(request: Request) -> dict[str, Any]:
    """The model of this server, and its adapters."""
    service = service_of(request)
    cards = service.cards.values()
    return {"object": "list", "data": [describe(service, card) for card in cards]}


@router.get("/{name:path}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """A model by its name, which may contain slashes."""
    service = service_of(request)
    if name not in service.cards:
        raise model_not_found(name, service.cards)
    return describe(service, service.cards[name])


def describe(service: Service, card: ModelCard) -> dict[str, Any]:
    """A model or adapter as the API shows it."""
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "lifecycle",
        "parent": card.parent,
        "max_model_len": service.max_model_len,
        "gated": card.gated,
    }
