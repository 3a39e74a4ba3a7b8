"""Health, metrics, and generated pictures."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from sfumato import __version__
from sfumato.api.dependencies import TheService, TheStore
from sfumato.api.http import documents, ranges
from sfumato.core import BATCH, PRIORITIES
from sfumato.pictures.store import STORED
from sfumato.serving.metrics import CONTENT_TYPE
from sfumato.serving.service import Service

PICTURE_HEADERS = {"cache-control": "public, immutable", "x-content-type-options": "nosniff"}


routes = APIRouter(tags=["Operations"])


@routes.get("/healthz", summary="Is the process alive?")
async def healthz() -> dict[str, str]:
    return {"status": "ok", "version": __version__}


@routes.get("/readyz", summary="Is it ready to draw?", responses={503: {"description": "Not ready yet"}})
async def readyz(service: TheService) -> JSONResponse:
    reason = _not_ready(service)
    if reason:
        return JSONResponse({"status": "not ready", "reason": reason}, 503)
    return JSONResponse({"status": "ready"})


@routes.get(
    "/metrics",
    summary="Metrics, for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **documents.errors(401, 403)},
)
async def metrics(service: TheService) -> Response:
    text = service.metrics.render(
        ready=not _not_ready(service),
        queue_depth={name: service.queue.waiting_of(name == BATCH) for name in PRIORITIES},
        running={name: service.queue.running_of(name == BATCH) for name in PRIORITIES},
        devices=service.engine.devices,
    )
    return Response(text, headers={"content-type": CONTENT_TYPE})


@routes.get(
    "/generated-images/{name}",
    summary="A generated picture",
    response_class=Response,
    responses={
        200: {"content": {media_type: {} for media_type in STORED.values()}},
        206: {"description": "The requested `Range`"},
        304: {"description": "Not modified: `If-None-Match` matches"},
        404: {"model": documents.Error, "description": "No such picture; it may have expired"},
        416: {"model": documents.Error, "description": "The range is outside the picture"},
    },
)
async def picture(name: str, request: Request, store: TheStore) -> Response:
    # Read completely before sending: the file may be deleted at any time.
    stored = await asyncio.to_thread(store.get, name)
    if stored is None:
        raise HTTPException(404)
    return ranges.answer(request, stored.data, stored.media_type, etag=f'"{name}"', headers=PICTURE_HEADERS)


def _not_ready(service: Service) -> str:
    """Why the server is not ready; empty if it is."""
    if not service.engine.ready:
        restarted = service.engine.stats.restarts
        return "the worker died; the next one is starting (see the log)" if restarted else "the worker is not up yet"
    service.catalog.refresh()
    return "" if service.catalog.all() else "no model file is usable: `sfumato check` shows why"
