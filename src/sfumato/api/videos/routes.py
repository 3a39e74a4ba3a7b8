"""OpenAI's Videos API: a clip is a job, whose stored request is its row; and LocalAI's synchronous `/video`."""

from __future__ import annotations

import asyncio
import base64
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from starlette.responses import JSONResponse

from sfumato.api.dependencies import Context, Owner, TheContext, TheGallery, TheStore
from sfumato.api.fields import PLAIN
from sfumato.api.http import documents, errors, ranges, urls
from sfumato.api.http.auth import caller_of
from sfumato.api.http.forms import openapi_body, reader
from sfumato.api.jobs.routes import TheJobs
from sfumato.api.jobs.tables import CLIPS, StoredJob, route_of
from sfumato.api.keeping import file_headers, file_keeper
from sfumato.api.openai.answers import all_pictures, picture_url, submit, unless_gone, warning_headers
from sfumato.api.videos.bodies import ClipBody, LocalVideoBody, VideosBody
from sfumato.api.videos.documents import ClipFiles, Video, VideoDeleted, Videos, of_generation, of_recipe, video_json
from sfumato.core import Done, StorePicture
from sfumato.errors import InvalidRequest, JobNotFound, JobsUnavailable, SfumatoError, StorageError
from sfumato.formats import FORMATS, VIDEO, of_kind
from sfumato.serving.job import Job

MAX_PAGE = 100

LOOK_S = 0.5
"""Interval of looking whether another server has ended a clip that is deleted."""

Id: Any = Annotated[str, Path(description="`id` of the clip.")]

FILES = {FORMATS[name].media_type: {"schema": {"type": "string", "format": "binary"}} for name in of_kind(VIDEO)}

routes = APIRouter(tags=["Videos"])


@routes.post(
    "/videos",
    summary="Draw a clip, as a job that survives the server",
    description="Answered at once, or with what is wrong with the request. `GET /v1/videos/{id}` says how far it is.",
    response_model=Video,
    openapi_extra=openapi_body(VideosBody),
    responses=documents.errors(400, 401, 403, 404, 413, 415, 422, 429, 500, 503),
)
async def create(body: Annotated[VideosBody, Depends(reader(VideosBody))], context: TheContext) -> Response:
    """What carries out the stored request; its client has got a `Video` meanwhile."""
    job = await submit(context.service, body, context.origin | {"keep": _keeper(context, body, required=True)})
    try:
        (done,) = await all_pictures(job, context.gallery)
    except SfumatoError as error:  # the clip still says what it was to be
        known = of_generation(job.config.name, job.parts[0].generation)
        return errors.logged(context.request, error, known)
    answer = of_recipe(done.recipe) | {"file": job.parts[0].name, "warnings": list(done.warnings)}
    return JSONResponse(answer, headers=warning_headers(body.ignored(), [done]) | file_headers(job, done))


@routes.post(
    "/videos/sync",
    summary="Draw a clip, and answer with its file",
    response_class=Response,
    openapi_extra=openapi_body(VideosBody),
    responses={200: {"content": FILES}, **documents.ACCEPTED, **documents.errors(*documents.REASONS)},
)
async def sync(body: Annotated[VideosBody, Depends(reader(VideosBody))], context: TheContext) -> Response:
    job, done = await unless_gone(context.request, _drawn(context, body, required=False))
    headers = warning_headers(body.ignored(), [done]) | file_headers(job, done)
    return Response(done.file, media_type=FORMATS[done.format].media_type, headers=headers)


@routes.get(
    "/videos",
    summary="The caller's clips; without keys, everybody's",
    response_model=Videos,
    responses=documents.errors(400, 401, 403, 503),
)
async def page(
    jobs: TheJobs,
    owner: Owner,
    after: Annotated[str | None, Query(max_length=100, description="`last_id` of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Clips per page."), PLAIN] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of creation.")] = "desc",
) -> dict[str, Any]:
    before = await _clip(jobs, after, owner) if after else None
    if after and before is None:
        raise InvalidRequest(f"after: {after[:100]!r} is no clip of yours", param="after")
    place = (before.created, before.id) if before else None
    found, more = await jobs.blocking(
        jobs.store.page, owner, before=place, limit=limit, route=CLIPS, ascending=order == "asc"
    )
    data = [await _video(jobs, job) for job in found]
    ids = [each["id"] for each in data] or [None]
    return {"object": "list", "data": data, "first_id": ids[0], "last_id": ids[-1], "has_more": more}


@routes.get(
    "/videos/{id}",
    summary="A clip: its progress, and once it is there its length",
    response_model=Video,
    responses=documents.errors(401, 403, 404, 503),
)
async def one(id: Id, jobs: TheJobs, owner: Owner) -> dict[str, Any]:
    return await _video(jobs, await _require(jobs, id, owner))


@routes.get(
    "/videos/{id}/content",
    summary="The file of a clip",
    response_class=Response,
    responses={
        200: {"content": FILES},
        206: {"description": "The requested `Range`"},
        304: {"description": "Not modified: `If-None-Match` matches"},
        **documents.errors(400, 401, 403, 404, 503),
        416: {"model": documents.Error, "description": "The range is outside the file"},
    },
)
async def content(
    id: Id,
    jobs: TheJobs,
    owner: Owner,
    request: Request,
    store: TheStore,
    variant: Annotated[Literal["video"], Query(description="There are no thumbnails and spritesheets.")] = "video",
) -> Response:
    video = await _video(jobs, await _require(jobs, id, owner))
    stored = await asyncio.to_thread(store.get, video["file"]) if video["file"] else None
    if stored is None:
        why = "its file has expired" if video["status"] == "completed" else f"it is {video['status']}"
        raise JobNotFound(f"the clip {id} has no content: {why}", param="id")
    headers = {"cache-control": "private, max-age=604800, immutable"}
    return ranges.answer(request, stored.data, stored.media_type, etag=f'"{video["file"]}"', headers=headers)


@routes.delete(
    "/videos/{id}",
    summary="Delete a clip, and end the work on it",
    response_model=VideoDeleted,
    responses=documents.errors(401, 403, 404, 503),
)
async def delete(id: Id, jobs: TheJobs, owner: Owner, gallery: TheGallery) -> dict[str, Any]:
    job = await _require(jobs, id, owner)
    if job.open:
        await _end(jobs, job)
    video = await _video(jobs, await _require(jobs, id, owner))
    if video["file"]:
        with suppress(StorageError):  # it expires
            await asyncio.to_thread(gallery.delete, video["file"])
    await jobs.blocking(jobs.store.delete, id)
    return {"id": id, "object": "video.deleted", "deleted": True}


of_localai = APIRouter(tags=["LocalAI"])


@of_localai.post(
    "/video",
    summary="Draw a clip",
    response_model=ClipFiles,
    openapi_extra=openapi_body(LocalVideoBody),
    responses={**documents.ACCEPTED, **documents.errors(*documents.REASONS)},
)
async def video(body: Annotated[LocalVideoBody, Depends(reader(LocalVideoBody))], context: TheContext) -> Response:
    b64 = body.wants_b64()
    job, done = await unless_gone(context.request, _drawn(context, body, required=not b64))
    base = urls.base_url(context.request, context.service.settings)
    file = await asyncio.to_thread(base64.b64encode, done.file) if b64 else b""
    item = {"b64_json": file.decode()} if b64 else {"url": picture_url(base, job.parts[0].name)}
    answer = {"id": job.id, "created": int(job.created), "data": [item]}
    return JSONResponse(answer, headers=warning_headers(body.ignored(), [done]))


async def _drawn(context: Context, body: ClipBody, *, required: bool) -> tuple[Job, Done]:
    """The clip of a request, and what it was; `required` as in `keeper`."""
    job = await submit(context.service, body, context.origin | {"keep": _keeper(context, body, required=required)})
    (done,) = await all_pictures(job, context.gallery)
    return job, done


def _keeper(context: Context, body: ClipBody, *, required: bool) -> StorePicture | None:
    return file_keeper(context.gallery, caller_of(context.request), body.format, required=required)


async def _video(jobs: TheJobs, job: StoredJob) -> dict[str, Any]:
    answer = None if job.open else await jobs.blocking(jobs.store.answer, job.id)
    return video_json(job, jobs.run_of(job.id), answer, keep_s=jobs.store.max_age_s)


async def _end(jobs: TheJobs, job: StoredJob) -> None:
    """Cancel the work on a clip; returns when it has ended, also on another server: a row that is gone stops no work.

    Raises JobsUnavailable if this server stops meanwhile.
    """
    await jobs.cancel(job)
    while (found := await jobs.blocking(jobs.store.get, job.id)) and found.open:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await jobs.stopping.wait()
                raise JobsUnavailable("the clip is being cancelled, and this server stops: delete it again")


async def _require(jobs: TheJobs, id: str, owner: str | None) -> StoredJob:
    """Raises JobNotFound."""
    if job := await _clip(jobs, id, owner):
        return job
    raise JobNotFound(f"you have no clip {id[:100]!r}; it may have expired. GET /v1/videos lists them.", param="id")


async def _clip(jobs: TheJobs, id: str, owner: str | None) -> StoredJob | None:
    """The stored request of a clip; None if that id is another's, or no clip's."""
    job = await jobs.blocking(jobs.store.get, id, owner)
    return job if job and route_of(job.request) == CLIPS else None
