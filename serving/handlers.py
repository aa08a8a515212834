"""Every failure in OpenAI's form: validation, unknown routes, our own errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serving.errors import ApiError, bad_request
from serving.http import counted_response, error_response


def add_handlers(app: FastAPI) -> None:
    """Have an application answer all its errors in OpenAI's form."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return counted_response(request.app, error)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(_first_problem(error.errors()))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no {request.method} {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    if error.status_code == 400 and error.__cause__ is not None:
        # What the framework tells of any body that it cannot parse is only that.
        message = f"the body is no JSON that can be read: {_reason(error.__cause__)}"
    return error_response(ApiError(error.status_code, message, headers=error.headers))


def _reason(error: BaseException) -> str:
    """Why a body could not be parsed; nothing of what it holds."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is no {error.encoding.upper()}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    # Python reads no integer of more than 4,300 digits.
    return "a number has too many digits" if isinstance(error, ValueError) else "it is damaged"


def _first_problem(problems: Sequence[Any]) -> ApiError:
    problem = problems[0]
    context = problem.get("ctx", {})
    if problem["type"] == "json_invalid":
        place = problem["loc"][-1]
        return bad_request(f"the body is no valid JSON: {context['error']} at character {place}")
    param = _path((*problem["loc"], *([context["param"]] if "param" in context else [])))
    where = f"{param}: " if param else "the body: "
    return bad_request(where + problem["msg"], param=param)


def _path(location: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "role")` as `messages[0].role`."""
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or None
