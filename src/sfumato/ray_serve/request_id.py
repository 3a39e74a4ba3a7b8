"""One `x-request-id` in a response: Ray's proxy adds it, also where the application has."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class OneRequestId:
    """Removes the application's, if Ray's is the same."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        theirs = (b"x-request-id", Headers(scope=scope).get("x-request-id", "").encode("latin-1"))

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if tuple(header) != theirs]
            await send(message)

        await self.app(scope, receive, send_without)
