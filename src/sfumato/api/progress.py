"""Progress of a request, by the id in its `x-request-id` header, and cancelling it."""

from __future__ import annotations

import asyncio
import base64
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Query

from sfumato.api.dependencies import Owner, TheService
from sfumato.api.http import documents, errors
from sfumato.errors import RequestNotFound
from sfumato.pictures import recipe
from sfumato.serving.job import Job, Progress
from sfumato.serving.service import Service

MAX_IDS = 100
"""Maximum number of ids per query."""


routes = APIRouter(tags=["Progress"])


@routes.get(
    "/images/progress",
    summary="Progress of the caller's queued and running requests, oldest first; without keys, of all requests",
    response_model=documents.ProgressList,
    responses=documents.errors(400, 401, 403),
)
async def several(
    service: TheService,
    owner: Owner,
    id: Annotated[list[str], Query(max_length=MAX_IDS, description="Only these, including recently ended ones.")] = [],  # noqa: B006
    preview: Annotated[bool, Query(description="Include their latest previews.")] = False,
) -> dict[str, Any]:
    if not id:
        progresses = [job.progress() for job in service.jobs(owner)]
    else:
        progresses = []
        for each in dict.fromkeys(id):
            with suppress(RequestNotFound):
                progresses.append(service.progress(each, owner))
    return {
        "object": "list",
        "data": [await _progress_answer(service, owner, each, preview=preview) for each in progresses],
    }


@routes.get(
    "/images/progress/{id:path}",
    summary="Progress of a request",
    response_model=documents.ProgressState,
    responses=documents.errors(400, 401, 403, 404),
)
async def progress(
    id: str,
    service: TheService,
    owner: Owner,
    preview: Annotated[bool, Query(description="Include the latest preview.")] = False,
) -> dict[str, Any]:
    return await _progress_answer(service, owner, service.progress(id, owner), preview=preview)


@routes.delete(
    "/images/progress/{id:path}",
    summary="Cancel a request: it ends within one denoising step, and its caller gets 499",
    response_model=documents.ProgressState,
    responses=documents.errors(401, 403, 404),
)
async def cancel(id: str, service: TheService, owner: Owner) -> dict[str, Any]:
    return progress_json(await service.cancel_id(id, owner))


async def _progress_answer(service: Service, owner: str | None, progress: Progress, *, preview: bool) -> dict[str, Any]:
    answer = progress_json(progress)
    if preview and (jobs := service.jobs(owner, progress.id)):
        answer["preview"] = await asyncio.to_thread(_preview, jobs[-1])
    return answer


def progress_json(progress: Progress) -> dict[str, Any]:
    left = progress.seconds_left
    return {
        "id": progress.id,
        "object": "image.progress",
        "model": progress.model,
        "prompt": progress.prompt,
        "status": progress.state,
        "step": progress.step,
        "total": progress.total,
        "pictures": progress.pictures,
        "pictures_done": progress.pictures_done,
        "queue_position": progress.queue_position,
        "seconds_left": None if left is None else round(left, 1),
        "devices": list(progress.devices),
        "kept": [{"index": index, "name": name, "seed": seed} for index, name, seed in progress.kept],
        "error": errors.shape(progress.error)["error"] if progress.error else None,
        "preview": None,
    }


def _preview(job: Job) -> dict[str, Any] | None:
    """Preview of the first unfinished picture that has one."""
    for index, part in enumerate(job.parts):
        if part.preview and not part.done:
            preview = part.preview
            png = recipe.convert(preview.png, size=(preview.width, preview.height))
            return {"index": index, "step": preview.step, "b64_json": base64.b64encode(png).decode()}
    return None
