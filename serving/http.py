"""Small things that all parts of the HTTP side use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

from serving.errors import ApiError

T = TypeVar("T")


def error_response(error: ApiError) -> Response:
    """An error as a response. It is written in ASCII, for it may quote what is no text."""
    content = json.dumps(error.body)
    return Response(content, error.status, error.headers, media_type="application/json")


def counted_response(app: FastAPI, error: ApiError) -> Response:
    """As `error_response`; a 503 counts as a rejection."""
    if error.status == 503:
        app.state.service.worker.monitor.reject(error.code or "")
    return error_response(error)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work`, and cancel it when the client goes away. The request's body must be read.

    Raises:
        ClientDisconnect: the client went away first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
