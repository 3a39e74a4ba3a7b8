"""Middleware for every request: id, access log, metrics, body limit, handling of unexpected errors."""

from __future__ import annotations

import logging
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato import logs
from sfumato.api.http import errors
from sfumato.errors import InvalidRequest, RequestTooLarge, SfumatoError
from sfumato.serving.metrics import Metrics

access = logging.getLogger("sfumato.access")

QUIET = {"/healthz", "/readyz", "/metrics", "/sdapi/v1/progress", "/v1/status", "/v1/images/progress"}
"""Polled every few seconds by programs: logged at debug level."""

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

GONE = 499
"""Status in log and metrics for a request whose client disconnected."""


class RequestId:
    """Every response has `x-request-id`: the client's own if it is valid, else a new one.

    It also notes when the request arrived, in seconds since 1970.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        value = Headers(scope=scope).get("x-request-id", "")
        id = value if 0 < len(value) <= 128 and value.isascii() and value.isprintable() else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=id, arrived=time.time())
        logs.request_id.set(id)  # uvicorn runs each request in its own task, and so in its own context

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
            await send(message)

        await self.app(scope, receive, send_with_id)


class AccessLog:
    """Access log and metrics for every request. No query string, no body."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = GONE
        began = time.monotonic()
        path = _path(scope)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            seconds = time.monotonic() - began
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.record_http(_route(scope), method, status, seconds)
            fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 3)}
            fields["caller"] = scope.get("state", {}).get("caller", "")
            access.log(
                logging.DEBUG if path in QUIET else logging.INFO,
                "%s %s %d %.3f s caller=%s",
                method, path, status, seconds, fields["caller"] or "-",
                extra={"fields": fields},
            )  # fmt: skip


class LengthCheck:
    """Refuses a body whose length is stated twice: a proxy that uses the other one would see different requests."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope["headers"]} if scope["type"] == "http" else set()
        if not names >= {b"content-length", b"transfer-encoding"}:
            await self.app(scope, receive, send)
            return
        answer = errors.response(
            InvalidRequest("the request has both content-length and transfer-encoding; send one of them")
        )
        answer.headers["connection"] = "close"  # later bytes on it may belong to another client
        await answer(scope, receive, send)


class Head:
    """Every GET route also answers HEAD, with the same status and headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message["body"] = b""
            await send(message)

        scope["method"] = "GET"
        try:
            await self.app(scope, receive, send_head)
        finally:
            scope["method"] = "HEAD"  # for log and metrics


class UnhandledErrors:
    """Logs and answers unhandled errors, inside the middleware that every response needs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            return  # the client is gone
        except Exception as error:
            if scope["type"] != "http":
                raise
            answer = errors.response(errors.unexpected(error))
            if not started:
                await answer(scope, receive, send)
            # Else the answer breaks off: the server closes a connection whose answer is not complete.


class BodyCap:
    """Refuses a body that is too large before it is in memory. `limit` is in bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self.limit:
            await errors.response(self._too_large())(scope, receive, send)
            return
        received = 0

        async def capped() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise self._too_large()
            return message

        await self.app(scope, capped, send)

    def _too_large(self) -> SfumatoError:
        return RequestTooLarge(
            f"the request body is larger than {self.limit // 2**20} MiB; send smaller pictures, "
            "or raise the setting max_body_mb"
        )


def _path(scope: Scope) -> str:
    """The path as sent, percent-encoded, so it cannot contain a line break."""
    raw = scope.get("raw_path")
    return quote(scope["path"]) if raw is None else raw.decode("ascii", "backslashreplace")


def _route(scope: Scope) -> str:
    """The template of the matched route, including its router's prefix."""
    route = scope.get("route")
    template: str | None = getattr(route, "path_format", None) or getattr(route, "path", None)
    if template is None:
        return "none"
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    filled = template
    for name, value in scope.get("path_params", {}).items():
        filled = filled.replace(f"{{{name}}}", str(value))
    return path.removesuffix(filled) + template if path.endswith(filled) else template
