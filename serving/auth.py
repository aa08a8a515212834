"""API keys: every path needs one, except those that say how the server is."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import invalid_api_key
from serving.http import error_response

PUBLIC = frozenset({"/health", "/livez", "/readyz"})
"""All that can be asked without a key. A new route is closed unless it is added here."""


class ApiKeys:
    """The keys that a server accepts, kept as hashes."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def tenant(self, authorization: str) -> str | None:
        """Whose key an `Authorization` header carries: a name that is the same for the same key and tells
        nothing of it; None if it carries none of the keys."""
        scheme, _, key = authorization.partition(" ")
        # Headers are bytes, which Starlette shows as Latin-1; a key may be any UTF-8. Only ASCII
        # spaces are stripped: "à" in UTF-8 ends with what is a space in Latin-1.
        given = _digest(key.strip(" ").encode("latin-1"))
        # Hashes of one length, compared in constant time and all of them: the time taken
        # tells nothing about the keys.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        accepted = scheme.lower() == "bearer" and any(matches)
        return _digest(given).hex() if accepted else None


class RequireKey:
    """Middleware that turns away requests without a key, before anything of theirs is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC:
            await self._app(scope, receive, send)
            return
        tenant = self._keys.tenant(Headers(scope=scope).get("authorization", ""))
        if tenant is None:
            await error_response(invalid_api_key())(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
