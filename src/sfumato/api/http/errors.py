"""One error shape for every route: OpenAI's `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sfumato import logs
from sfumato.config.addresses import redact
from sfumato.errors import (
    DownloadError,
    InvalidRequest,
    JobsUnavailable,
    SfumatoError,
    TooManyRequests,
    Unauthorized,
    in_words,
    printable,
)

log = logging.getLogger(__name__)

LONGEST = 300
"""Characters of a value that a message quotes."""

MAX_MESSAGE = 4000
"""In characters: a message quotes the request, which may be long."""

PLAIN = {"Value error, ": "", "valid dictionary": "JSON object", "Input should": "it should", "instance": "value"}
"""Words of pydantic's messages -> ours."""

TYPES = ("str", "bytes", "int", "float", "bool")
"""What pydantic calls the branches of a choice between types."""


def install(app: FastAPI) -> None:
    app.add_exception_handler(SfumatoError, _sfumato_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


def shape(error: SfumatoError) -> dict[str, dict[str, str | None]]:
    message = printable(redact(error.message))[:MAX_MESSAGE]  # it may quote a URL of the request, or a file's name
    param = error.param and printable(error.param)
    return {"error": {"message": message, "type": error.type, "param": param, "code": error.code}}


def response(error: SfumatoError, more: Mapping[str, Any] = MappingProxyType({})) -> JSONResponse:
    """`more`: what stands beside the error."""
    # The OpenAI SDK retries every 5xx unless told not to; most of ours would fail again in the same way.
    headers = {"x-should-retry": "true" if error.retry else "false"}
    if isinstance(error, TooManyRequests | DownloadError | JobsUnavailable) and error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(shape(error) | dict(more), error.status, headers)


async def _sfumato_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SfumatoError)
    return logged(request, error)


def logged(request: Request, error: SfumatoError, more: Mapping[str, Any] = MappingProxyType({})) -> JSONResponse:
    """As `response`; an error of the server's is in its log."""
    if error.status >= 500:
        log.error("%s %s: %s: %s", request.method, request.url.path, error.code, printable(error.message))
    return response(error, more)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return response(invalid(error.errors()))


def invalid(problems: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """The first of pydantic's problems with a body, in our words; its location begins with `body`."""
    first = problems[0]
    field = _field(first["loc"])
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "missing":
        where = f"{field}: this field is required" if field else "the request needs a JSON body"
        return InvalidRequest(where, param=field or None)
    if first["type"] == "too_long":  # of a list: what is in it tells nothing
        count, most = len(first["input"]), first["ctx"]["max_length"]
        return InvalidRequest(f"{field}: {count} entries; at most {most} are valid", param=field or None)
    reason = first["msg"]
    for words, plain in PLAIN.items():
        reason = reason.replace(words, plain)
    sent = in_words(first.get("input"))
    sent = sent if len(sent) <= LONGEST else f"{sent[:LONGEST]}..."
    where = f"{field or 'the body'}: {sent} is not valid: {reason}"
    return InvalidRequest(where, param=field or None)


def _field(location: Sequence[int | str]) -> str:
    """The name of the field at fault; deeper parts are branches of our own types, except of an object in a list."""
    match location[1:4]:
        case [str(name), int(index), str(inner)] if inner.isidentifier() and inner not in TYPES:
            return f"{name}[{index}].{inner}"
        case [name, *_]:
            return str(name)
    return ""


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, SfumatoError):  # raised while FastAPI read the body
        return response(error.__cause__)
    messages = {
        404: f"there is no route {request.url.path}; /docs lists all routes",
        405: f"{request.method} is not allowed on {request.url.path}",
    }
    refusal = InvalidRequest(messages.get(error.status_code, str(error.detail)))
    answer = response(refusal)
    answer.status_code = error.status_code
    answer.headers.update(error.headers or {})
    return answer


def reported(error: Exception) -> SfumatoError:
    """What a client is told of an error."""
    return error if isinstance(error, SfumatoError) else unexpected(error)


def unexpected(error: Exception) -> SfumatoError:
    """The response to an unexpected error, which is logged."""
    log.error("%s", logs.error_location(error))
    return SfumatoError(f"internal server error ({type(error).__name__}); see the server's log")
