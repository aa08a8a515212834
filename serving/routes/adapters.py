"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as in vLLM; for the operator alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from lifecycle.errors import EngineError
from serving.adapter_schemas import LoadAdapterBody, UnloadAdapterBody
from serving.adapters import folder_inside
from serving.errors import bad_request
from serving.routes.generate import service_of
from serving.routes.models import describe
from serving.settings import ServerSettings

router = APIRouter(prefix="/v1")


@router.post("/load_lora_adapter")
async def load_lora_adapter(body: LoadAdapterBody, request: Request) -> dict[str, Any]:
    """Load an adapter from the server's adapter directory; the answer is what `/v1/models` has of it."""
    service = service_of(request)
    settings: ServerSettings = request.app.state.settings
    assert settings.adapter_root is not None
    root: Path = settings.adapter_root
    try:
        folder = await asyncio.to_thread(folder_inside, root, body.lora_path)
        card = await service.adapters.load(
            body.lora_name, folder, replace=body.load_inplace, evict=settings.evict_adapters
        )
    except EngineError as error:
        message = str(error).replace(f"{root.resolve()}/", "")
        raise bad_request(f"lora_path: {message}", param="lora_path") from error
    return describe(service, card)


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadAdapterBody, request: Request) -> dict[str, Any]:
    """Refuse new requests for an adapter; those that are there end with it."""
    await service_of(request).adapters.unload(body.lora_name)
    return {"id": body.lora_name, "object": "model", "deleted": True}
