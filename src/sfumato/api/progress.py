"""Where a request stands, by the id of its `x-request-id` header, and the way to end it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from sfumato.api.http import documents
from sfumato.api.http.auth import caller_of
from sfumato.serving.job import Progress
from sfumato.serving.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["Progress"])

    def owner(request: Request) -> str | None:
        """Whose requests may be seen: without keys everybody's, as addresses are no proof of anything."""
        return caller_of(request) if service.settings.api_keys else None

    @routes.get(
        "/images/progress/{id:path}",
        summary="Where a request stands",
        response_model=documents.ProgressState,
        responses=documents.errors(401, 403, 404),
    )
    async def progress(id: str, request: Request) -> dict[str, Any]:
        return _shown(service.progress(id, owner(request)))

    @routes.delete(
        "/images/progress/{id:path}",
        summary="Cancel a request: it ends within a denoising step, and its caller gets 499",
        response_model=documents.ProgressState,
        responses=documents.errors(401, 403, 404),
    )
    async def cancel(id: str, request: Request) -> dict[str, Any]:
        return _shown(await service.cancel_id(id, owner(request)))

    return routes


def _shown(progress: Progress) -> dict[str, Any]:
    left = progress.seconds_left
    return {
        "id": progress.id,
        "object": "image.progress",
        "model": progress.model,
        "status": progress.state,
        "step": progress.step,
        "total": progress.total,
        "pictures": progress.pictures,
        "pictures_done": progress.pictures_done,
        "queue_position": progress.queue_position,
        "seconds_left": None if left is None else round(left, 1),
    }
