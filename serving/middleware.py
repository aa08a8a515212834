"""What happens around every request: its id, the last resort for failures, limits on its body."""

from __future__ import annotations

import asyncio
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import NEVER_RETRY, ApiError, bodies_full, internal_error
from serving.http import counted_response, error_response

CLOSE = {"Connection": "close"}
SMALL_BODY = 64 * 1024
"""Bytes of each body that are always taken, so that who sends large ones slowly does not shut out the rest."""
MOST_HELD = 64 * 1024 * 1024
"""Bytes beyond these of all bodies that are still being read."""


class RequestContext:
    """Gives each request an id, sent back as `x-request-id`, and answers 500 when all fails."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            return
        except Exception:
            if not started:
                error = internal_error(request_id)
                # The server closes the connection behind it; a client must not send its next request there.
                error.headers |= CLOSE
                await error_response(error)(scope, receive, send_with_id)
            raise


class LimitBody:
    """Reads the body of a request: JSON only, not too long, not too slow."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float) -> None:
        self._app, self._max_bytes, self._timeout = app, max_bytes, timeout
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            _check_content_type(Headers(scope=scope))
            body = await self._read(Headers(scope=scope), receive)
        except ApiError as error:
            await counted_response(scope["app"], error)(scope, receive, send)
        else:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_bytes:
            raise self._too_large()
        body = bytearray()
        held = 0
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return bytes(body)
                    more = max(len(body) - SMALL_BODY, 0) - held
                    if self._held + more > max(MOST_HELD, self._max_bytes):
                        raise bodies_full(CLOSE)
                    self._held += more
                    held += more
        except TimeoutError:
            text = f"the request's body did not come within {self._timeout:g} s"
            raise ApiError(408, text, code="request_timeout", headers=CLOSE) from None
        finally:
            self._held -= held

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request's body is longer than {self._max_bytes} bytes",
            code="request_too_large",
            headers=CLOSE | NEVER_RETRY,
        )


def _check_content_type(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise _unsupported("the body must be JSON, with 'Content-Type: application/json'")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _unsupported("a compressed body is not supported; send it as it is")


def _unsupported(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type", headers=CLOSE)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first, then what the connection gives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
