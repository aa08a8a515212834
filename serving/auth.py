"""API keys: every path needs one, except those that say how the server is."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import ApiError, admin_only, invalid_api_key
from serving.http import error_response

PUBLIC = frozenset({"/health", "/livez", "/readyz"})
"""All that can be asked without a key. A new route is closed unless it is added here."""
ADMIN = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""What only the operator's keys may ask, whether others need keys or not."""


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

    def __init__(self, app: ASGIApp, keys: ApiKeys, admins: ApiKeys) -> None:
        """Without `keys`, only what is the operator's needs one; `admins` are good for everything."""
        self._app, self._keys, self._admins = app, keys, admins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_closed = scope["type"] == "http" and scope["path"] not in PUBLIC
        if is_closed and (error := self._refusal(scope)) is not None:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Why a request is turned away, if it is; else whose it is is noted."""
        is_admin = scope["path"] in ADMIN
        if not (self._keys or is_admin):
            return None
        header = Headers(scope=scope).get("authorization", "")
        client, admin = self._keys.tenant(header), self._admins.tenant(header)
        if client is None and admin is None:
            return invalid_api_key()
        if is_admin and admin is None:
            return admin_only()
        scope.setdefault("state", {})["tenant"] = client or admin
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
