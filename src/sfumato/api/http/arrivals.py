"""Make drawing requests cancellable by id from their first byte, before their body has arrived."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.errors import Cancelled
from sfumato.serving.job import CANCELLED, Arrival
from sfumato.serving.service import Service

DRAWING = (
    "/images/generations", "/images/edits", "/images/variations", "/images/inpainting", "/images/upscale",
    "/chat/completions", "/videos", "/videos/sync", "/video", "/audio/generate", "/sound-generation",
    "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/extra-single-image",
    "/api/generate",
)  # fmt: skip
"""Path suffixes of drawing routes."""

OF_A_MODEL = "/models/"
"""Hugging Face's route ends with a model's name, which may be anything but the name of an order."""
ORDERS = ("/models/load", "/models/unload", "/models/pin")


class Arrivals:
    """Registers each drawing request with the service. Innermost middleware: id and caller are known here."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not draws(scope):
            await self.app(scope, receive, send)
            return
        state = scope["state"]
        with self._service.register_arrival(state["request_id"], state["caller"]) as arrival:

            async def received() -> Message:
                return await receive() if arrival.submitted else await unless_cancelled(receive, arrival)

            await self.app(scope, received, send)


def draws(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.endswith(DRAWING) or path == "/" or (path.startswith(OF_A_MODEL) and path not in ORDERS)


async def unless_cancelled(receive: Receive, arrival: Arrival) -> Message:
    """The next chunk of the body. Raises Cancelled as soon as the request is cancelled."""
    message = asyncio.ensure_future(receive())
    cancelled = asyncio.ensure_future(arrival.cancelled.wait())
    try:
        await asyncio.wait({message, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        if arrival.cancelled.is_set():
            raise Cancelled(CANCELLED)
        return message.result()
    finally:
        for task in (message, cancelled):
            task.cancel()
