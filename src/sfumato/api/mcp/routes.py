"""The route `/mcp`: streamable HTTP, with the keys, limits and checks of the other routes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Depends
from pydantic_core import from_json
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sfumato.api.dependencies import part
from sfumato.api.http import body_cost, content_type, errors
from sfumato.api.http.shutdown import LAST_EVENT, ActiveRequests
from sfumato.api.mcp.server import Protocol
from sfumato.api.mcp.sessions import Sessions
from sfumato.errors import SfumatoError, UnsupportedMedia
from sfumato.pictures.gallery import Gallery
from sfumato.serving.service import Service

INVALID, INTERNAL = -32600, -32603
"""JSON-RPC's codes of errors."""

SESSION = b"mcp-session-id"


def error_shape(error: dict[str, Any]) -> dict[str, Any]:
    """JSON-RPC's, of a request whose id is not known."""
    code = INTERNAL if error["type"] == "server_error" else INVALID
    data = {name: error[name] for name in ("type", "param", "code")}
    return {"jsonrpc": "2.0", "id": None, "error": {"code": code, "message": error["message"], "data": data}}


class Endpoint:
    """What answers `/mcp`. The protocol's package is imported at the first request, and runs until `close`."""

    def __init__(self, service: Service, gallery: Gallery, running: ActiveRequests | None) -> None:
        """`running`: of a server that says when it begins to stop, and lets requests finish until then."""
        self._service, self._gallery = service, gallery
        self._told_of_stop = running is not None
        if running:
            running.at_stop.append(lambda: self._stops.set())
        self._starting = asyncio.Lock()
        self._protocol: Protocol | None = None
        self._running: asyncio.Task[None] | None = None
        self._end = asyncio.Event()
        self._stops = asyncio.Event()
        self._sessions = Sessions()

    async def close(self) -> None:
        if self._running:
            self._end.set()
            await self._running
        self._starting, self._end = asyncio.Lock(), asyncio.Event()
        self._protocol = self._running = None
        self._stops = asyncio.Event()
        self._sessions = Sessions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises SfumatoError for a request that is refused before its message is read."""
        protocol = await self._started()
        if scope["method"] == "POST":
            receive = await self._checked(scope, receive)
        elif scope["method"] == "GET":  # a session's standing stream
            receive = _until(self._stops, receive)
        caller = scope["state"]["caller"]
        if user := protocol.user(caller):
            scope["user"] = user
        session, complete = "", False

        async def watched(message: Message) -> None:
            nonlocal session, complete
            if message["type"] == "http.response.start" and message["status"] < 400:
                session = _header(message["headers"], SESSION)
                if session and scope["method"] == "DELETE":
                    self._sessions.forget(session)
                elif session:
                    self._sessions.begin(session, caller)
                    if excess := self._sessions.take_one_too_many(caller):
                        await _delete(protocol, scope, *excess)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await protocol.manager.handle_request(scope, receive, watched)
            if session and not complete and self._stops.is_set():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._sessions.end(session)

    async def _started(self) -> Protocol:
        """Raises NotInstalled."""
        async with self._starting:
            if self._protocol is None:
                protocol = await asyncio.to_thread(Protocol, self._service, self._gallery)
                if self._told_of_stop:
                    protocol.finish_calls()
                ready = asyncio.Event()
                self._running = asyncio.create_task(self._run(protocol, ready))
                await ready.wait()
                self._protocol = protocol
            return self._protocol

    async def _run(self, protocol: Protocol, ready: asyncio.Event) -> None:
        # One task enters and leaves it: it is a group of tasks.
        async with protocol.manager.run():
            ready.set()
            await self._end.wait()

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """What receives the body again once it is known that reading it is cheap enough."""
        header = _header(scope["headers"], b"content-type")
        if content_type.parse(header).type != "application/json":  # the package reads no other
            raise UnsupportedMedia(f"content-type: {header[:100]!r} is not supported; use application/json")
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return _replayed(message, receive)
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await asyncio.to_thread(body_cost.check_json, body, self._service.settings.max_text_mb * 2**20)
        scope["state"][LAST_EVENT] = functools.partial(_last_event, _id_of(body))
        return _replayed({"type": "http.request", "body": bytes(body), "more_body": False}, receive)


def _id_of(body: bytes | bytearray) -> str | int | None:
    """Of a request, which its answer repeats; None of anything else."""
    try:
        message = from_json(body)
    except ValueError:
        return None
    id = message.get("id") if isinstance(message, dict) else None
    return id if isinstance(id, str | int) else None


def _last_event(id: str | int | None, error: SfumatoError) -> dict[str, Any]:
    return error_shape(errors.shape(error)["error"]) | {"id": id}


def _header(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> str:
    return next((value for name, value in headers if name.lower() == wanted), b"").decode("latin-1")


async def _delete(protocol: Protocol, scope: Scope, session: str, caller: str) -> None:
    """End a session as its own client would."""

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        """Nobody asked."""

    headers = [(SESSION, session.encode("latin-1"))]
    scope = {**scope, "method": "DELETE", "headers": headers, "user": protocol.user(caller)}
    await protocol.manager.handle_request(scope, receive, send)


def _until(end: asyncio.Event, receive: Receive) -> Receive:
    """Says that the client is gone once `end` is set."""

    async def received() -> Message:
        waits = {asyncio.ensure_future(receive()), asyncio.ensure_future(end.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            results = [each.result() for each in waits if each.done()]
        finally:
            for each in waits:
                each.cancel()
        return next((each for each in results if isinstance(each, dict)), {"type": "http.disconnect"})

    return received


def _replayed(first: Message, receive: Receive) -> Receive:
    messages = [first]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


class _Delegated(Response):
    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, send)


TheEndpoint: TypeAlias = Annotated[Endpoint, Depends(part("mcp"))]

routes = APIRouter(include_in_schema=False)


@routes.api_route("/mcp", methods=["GET", "POST", "DELETE"])
async def mcp(endpoint: TheEndpoint) -> Response:
    return _Delegated(endpoint)
