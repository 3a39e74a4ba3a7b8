"""Requests that draw can be cancelled by their id from their first byte on, before their body is there."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.errors import Cancelled
from sfumato.serving.job import CANCELLED, Arrival
from sfumato.serving.service import Service

DRAWING = (
    "/images/generations", "/images/edits", "/images/variations", "/images/inpainting", "/images/upscale",
    "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/extra-single-image",
)  # fmt: skip
"""What the paths of routes that draw end in."""


class Arrivals:
    """Tells the service of each request to draw. Innermost: id and caller are known here."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(DRAWING):
            await self.app(scope, receive, send)
            return
        state = scope["state"]
        with self._service.arriving(state["request_id"], state["caller"]) as arrival:

            async def received() -> Message:
                return await receive() if arrival.submitted else await _unless_cancelled(receive, arrival)

            await self.app(scope, received, send)


async def _unless_cancelled(receive: Receive, arrival: Arrival) -> Message:
    """The next piece of the body. Raises Cancelled as soon as somebody cancels the request."""
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
