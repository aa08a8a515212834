"""Server-sent events: a generation as a stream of JSON chunks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.errors import ApiError, internal_error
from serving.formats import Format
from serving.generation import Delta, Generation
from serving.http import unless_disconnected

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"


class EventStream(StreamingResponse):
    """Streams a generation, and ends it when the client goes away."""

    def __init__(self, generation: Generation, form: Format, keep_alive: float) -> None:
        self._generation = generation
        super().__init__(
            _events(generation, form, keep_alive),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self.stream_response(send))
        finally:
            self._generation.close()


async def _events(generation: Generation, form: Format, keep_alive: float) -> AsyncIterator[bytes]:
    try:
        for choice in form.opening():
            yield _frame(form.chunk([choice]))
        async for deltas in _with_pauses(generation, keep_alive):
            # One write for all that a step gave, however many answers it advanced.
            yield b"".join(_frame(form.chunk([form.delta(d)])) for d in deltas) or COMMENT
        if form.include_usage:
            yield _frame(form.usage_chunk(generation))
        yield DONE
    except ApiError as error:
        yield _frame(error.body)
    except Exception:
        yield _frame(internal_error().body)
        raise


async def _with_pauses(generation: Generation, seconds: float) -> AsyncIterator[list[Delta]]:
    """The deltas of a generation, and an empty list whenever none came for some seconds."""
    while True:
        try:
            yield await asyncio.wait_for(anext(generation), seconds)
        except TimeoutError:
            yield []
        except StopAsyncIteration:
            return


def _frame(content: Mapping[str, Any]) -> bytes:
    # In ASCII, for many clients take more than "\n" for the end of a line, such as U+2028.
    text = json.dumps(content, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
