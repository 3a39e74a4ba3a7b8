"""Requests that still run when the server has to stop: each is answered, in the shape of every other error."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.api.http import errors
from sfumato.errors import ServerStops

LAST_WORD_S = 5.0
"""A client that does not read its answer is not waited for any longer."""


class Running:
    """The requests that are being answered, and their common end."""

    def __init__(self) -> None:
        self.ended = False
        self.tasks: set[asyncio.Task[Any]] = set()

    def end(self) -> int:
        """Have each answered with 503 now, and every later one; returns how many there were."""
        self.ended = True
        for task in self.tasks:
            task.cancel()
        return len(self.tasks)


class Ending:
    """Answers for a request that `Running.end` cuts off; what it was doing is cancelled, as when its client leaves."""

    def __init__(self, app: ASGIApp, running: Running) -> None:
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
        """Of the answer, once it has begun."""
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
                await _last_word(kind, scope, receive, send)
        finally:
            self._running.tasks.discard(task)


async def _last_word(kind: str | None, scope: Scope, receive: Receive, send: Send) -> None:
    with suppress(TimeoutError, asyncio.CancelledError):
        async with asyncio.timeout(LAST_WORD_S):
            if kind is None:
                await errors.response(_error())(scope, receive, send)
            elif kind.startswith("text/event-stream"):
                event = f"data: {json.dumps(errors.shape(_error()))}\n\n"
                await send({"type": "http.response.body", "body": event.encode(), "more_body": False})
            # Else the answer breaks off: the server closes a connection whose answer is not complete.


def _error() -> ServerStops:
    return ServerStops("the server stops and cannot wait for this request any longer; send it again in a while")
