"""The ASGI application: routes, error shape, request ids, body cap."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato import __version__
from sfumato.api import errors, openai, ops
from sfumato.errors import InvalidRequest
from sfumato.service import Service
from sfumato.store import Store


def create_app(service: Service, store: Store) -> FastAPI:
    """The application over a service that is started and stopped with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="Sfumato",
        version=__version__,
        description="Text-to-image, image-to-image and inpainting with any diffusers pipeline.",
        lifespan=lifespan,
    )
    errors.install(app)
    app.include_router(openai.router(service, store), prefix="/v1")
    # LocalAI's clients leave the prefix out as often as not.
    app.include_router(openai.router(service, store), include_in_schema=False)
    app.include_router(ops.router(service, store))
    app.add_middleware(_BodyCap, limit=service.settings.max_body_mb * 2**20)
    app.add_middleware(_RequestId)
    return app


class _RequestId:
    """Every answer carries `x-request-id`: the client's own, if it sent a sane one, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        id = given if 0 < len(given) <= 128 and given.isascii() else uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", id)]
            await send(message)

        await self.app(scope, receive, send_with_id)


class _BodyCap:
    """Refuse a body that is too large before it is in memory."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            await self._refuse(scope, receive, send)
            return
        taken = 0

        async def capped() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.limit:
                raise self._too_large()
            return message

        await self.app(scope, capped, send)

    def _too_large(self) -> InvalidRequest:
        return InvalidRequest(
            f"the request body is larger than {self.limit // 2**20} MiB; send smaller pictures, "
            "or raise the setting max_body_mb"
        )

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await errors.response(self._too_large())(scope, receive, send)
