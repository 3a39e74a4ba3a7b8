"""Errors in the shape of the API whose path was called.

Errors come from routes, from the parser of bodies and from every middleware (`errors.response`), all in OpenAI's shape.
This is the one place where the paths of another API get that API's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Shape: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
"""OpenAI's `{message, type, param, code}` → the whole body of the other API's error."""


OURS = {"message", "type", "param", "code"}


def text_shape(error: dict[str, Any]) -> dict[str, Any]:
    """Ollama's and Hugging Face's: their clients show a text only."""
    return {"error": error["message"]}


def openai_shape(error: dict[str, Any]) -> dict[str, Any]:
    """As it is, for a path among those of another API."""
    return {"error": error}


class ErrorShapes:
    """ASGI middleware. `shapes`: a path, or the beginning of paths if it ends in `/`, → the shape of its errors.

    A method may stand before the path, and the first that fits counts.
    """

    def __init__(self, app: ASGIApp, shapes: Mapping[str, Shape]) -> None:
        self.app = app
        self._shapes = shapes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        """Of an error in OpenAI's shape, while its body is awaited."""
        body = b""

        async def shaped(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and _is_error(message) and self._shape(scope):
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await self._send(scope, start, body, send)

        await self.app(scope, receive, shaped)

    def _shape(self, scope: Scope) -> Shape | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return next((shape for name, shape in self._shapes.items() if _is_at(name, scope["method"], path)), None)

    async def _send(self, scope: Scope, start: Message, body: bytes, send: Send) -> None:
        error = json.loads(body).get("error") if body else None  # none in an answer to HEAD
        shape = self._shape(scope)
        if shape and isinstance(error, dict) and error.keys() == OURS:
            body = json.dumps(shape(error)).encode()
            MutableHeaders(scope=start)["content-length"] = str(len(body))
        await send(start)
        await send({"type": "http.response.body", "body": body})


def _is_at(name: str, method: str, path: str) -> bool:
    of, _, place = name.rpartition(" ")
    below = place.endswith("/") and place != "/" and path.startswith(place)
    return of in ("", method) and (path == place or below)


def _is_error(message: Message) -> bool:
    headers = Headers(raw=message["headers"])
    return message["status"] >= 400 and headers.get("content-type", "").startswith("application/json")
