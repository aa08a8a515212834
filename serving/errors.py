"""What a client is told when a request fails: OpenAI's error body, and nothing internal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

RETRY_AFTER = {"Retry-After": "1"}
NEVER_RETRY = {"x-should-retry": "false"}
"""The official clients retry some failures by themselves; this header tells them not to."""


class ApiError(Exception):
    """A failed request, as the client is to see it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.type, self.param, self.code = type, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body: all four fields, whatever the error."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is wrong, and sending it again will not help."""
    return ApiError(400, message, param=param, code=code)


def context_length_exceeded(message: str, param: str) -> ApiError:
    """400: prompt and answer do not fit into the context."""
    return ApiError(400, message, param=param, code="context_length_exceeded", headers=NEVER_RETRY)


def invalid_api_key() -> ApiError:
    """401: no key, or a wrong one."""
    return ApiError(
        401,
        "missing or wrong API key; send it as 'Authorization: Bearer KEY'",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def admin_only() -> ApiError:
    """403: the key is right, but not one of the operator's."""
    return ApiError(
        403, "this needs one of the keys of --admin-key-file", code="admin_key_required"
    )


def model_not_found(name: str, served: Iterable[str], param: str = "model") -> ApiError:
    """404: the request names a model that is not served here."""
    known = ", ".join(f"'{one}'" for one in served) or "none"
    return ApiError(
        404,
        f"the model '{name:.200}' does not exist; this server has {known}",
        param=param,
        code="model_not_found",
    )


def queue_full() -> ApiError:
    """503: as many requests wait as may wait."""
    return _unavailable("the server is busy and its queue is full; try again", "queue_full")


def bodies_full(headers: Mapping[str, str]) -> ApiError:
    """503: the bodies that are being read are as much as may be held."""
    error = _unavailable("the server is reading too many large bodies; try again", "bodies_full")
    error.headers |= headers
    return error


def draining() -> ApiError:
    """503: the server finishes what runs and takes nothing new."""
    return _unavailable("the server is shutting down", "draining")


def engine_stopped() -> ApiError:
    """503: the engine died; the log says why."""
    return _unavailable("the engine has stopped; the server must be restarted", "engine_stopped")


def internal_error(request_id: str | None = None) -> ApiError:
    """500: a failure of ours. Its text stays in the log: it may name paths or addresses."""
    where = f"; its log has the details under {request_id}" if request_id else ""
    return ApiError(
        500, f"the server failed to answer{where}", type="server_error", code="internal_error"
    )


def _unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, type="server_error", code=code, headers=RETRY_AFTER)
