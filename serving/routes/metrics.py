"""What the server has done, for Prometheus; like every other route it needs a key."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from serving.metrics import CONTENT_TYPE
from serving.routes.generate import service_of

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """The figures of the server in Prometheus' text format."""
    worker = service_of(request).worker
    page = worker.monitor.page(worker.stats)
    return Response(page, headers={"Content-Type": CONTENT_TYPE})
