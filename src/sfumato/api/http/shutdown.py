"""Answer the requests that still run when the server must stop, in the usual error shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.api.http import errors
from sfumato.errors import ServerStops

LAST_EVENT = "last_event"
"""Key of a request's state: `(error) -> JSON`, the last event of a stream of another API than OpenAI's."""

FINAL_RESPONSE_S = 5.0
"""Maximum seconds to wait for a client that does not read its response."""


class ActiveRequests:
    """Tracks the requests in progress, to end them together."""

    def __init__(self) -> None:
        self.ended = False
        self.tasks: set[asyncio.Task[Any]] = set()
        self.at_stop: list[Callable[[], None]] = []
        """End what would wait for ever: called when the server begins to stop, and waits for requests."""

    def begin_stop(self) -> None:
        for call in self.at_stop:
            call()

    def end(self) -> int:
        """Answer each of them, and every later request, with 503; returns their number."""
        self.ended = True
        for task in self.tasks:
            task.cancel()
        return len(self.tasks)


class Shutdown:
    """Answers a request that `ActiveRequests.end` stops; its work is cancelled, as when its client disconnects."""

    def __init__(self, app: ASGIApp, running: ActiveRequests) -> None:
        self.app = app
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._running.ended:
            await errors.response(_error())(scope, receive, send)
            return
        kind: str | None = None
        """Content type of the response, once it has begun."""
        complete = False

        async def watched(message: Message) -> None:
            nonlocal kind, complete
            await send(message)
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)

        task = asyncio.current_task()
        assert task is not None
        self._running.tasks.add(task)
        try:
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:
            if not self._running.ended:
                raise
            task.uncancel()
            if not complete:
                await _send_final_response(kind, scope, receive, send)
        finally:
            self._running.tasks.discard(task)


async def _send_final_response(kind: str | None, scope: Scope, receive: Receive, send: Send) -> None:
    with suppress(TimeoutError, asyncio.CancelledError):
        async with asyncio.timeout(FINAL_RESPONSE_S):
            if kind is None:
                await errors.response(_error())(scope, receive, send)
            elif kind.startswith("text/event-stream"):
                shape = scope["state"].get(LAST_EVENT, errors.shape)
                event = f"data: {json.dumps(shape(_error()))}\n\n"
                await send({"type": "http.response.body", "body": event.encode(), "more_body": False})
            elif kind.startswith("application/x-ndjson"):
                line = json.dumps({"error": _error().message}) + "\n"
                await send({"type": "http.response.body", "body": line.encode(), "more_body": False})
            # Else the answer breaks off: the server closes a connection whose answer is not complete.


def _error() -> ServerStops:
    return ServerStops("the server is stopping before this request is finished; send it again later")
