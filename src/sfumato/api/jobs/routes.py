"""`/v1/jobs`: state, answer, events and cancellation of stored requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Depends, Header, Path, Query, Response
from starlette.responses import StreamingResponse

from sfumato.api.dependencies import Owner, part
from sfumato.api.fields import PLAIN
from sfumato.api.http import documents
from sfumato.api.jobs.documents import JobPage, JobState, job_json
from sfumato.api.jobs.jobs import Jobs
from sfumato.api.jobs.tables import StoredJob
from sfumato.api.openai.answers import KEEP_ALIVE_S
from sfumato.errors import InvalidRequest, JobNotFound

MAX_PAGE = 100
"""Maximum jobs per page."""

LOOK_S = 0.25
"""Interval of looking for progress, for events; of another server's job, eight times as long."""

END = "end"
"""Id of the last event."""

TheJobs: TypeAlias = Annotated[Jobs, Depends(part("jobs"))]
Id: TypeAlias = Annotated[str, Path(description="The last part of `location` in the 202.")]

routes = APIRouter(tags=["Jobs"])


@routes.get(
    "/jobs",
    summary="The caller's stored requests, newest first; without keys, everybody's",
    response_model=JobPage,
    responses=documents.errors(400, 401, 403, 503),
)
async def page(
    jobs: TheJobs,
    owner: Owner,
    before: Annotated[str | None, Query(max_length=100, description="`next` of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Jobs per page."), PLAIN] = 20,
) -> dict[str, Any]:
    found, more = await jobs.blocking(jobs.store.page, owner, before=_place(before), limit=limit)
    following = f"{found[-1].created!r}_{found[-1].id}" if more else None
    data = [job_json(job, jobs.run_of(job.id)) for job in found]
    return {"object": "list", "data": data, "has_more": more, "next": following}


@routes.get(
    "/jobs/{id}",
    summary="A stored request: its progress, and once it has ended its answer",
    response_model=JobState,
    responses=documents.errors(401, 403, 404, 503),
)
async def one(id: Id, jobs: TheJobs, owner: Owner) -> Response:
    return await _job_answer(jobs, await _require(jobs, id, owner))


@routes.delete(
    "/jobs/{id}",
    summary="Cancel a stored request: it ends within one denoising step. One that has ended stays as it is",
    response_model=JobState,
    responses=documents.errors(401, 403, 404, 503),
)
async def cancel(id: Id, jobs: TheJobs, owner: Owner) -> Response:
    job = await _require(jobs, id, owner)
    if job.open:
        await jobs.cancel(job)
        job = await _require(jobs, id, owner)
    return await _job_answer(jobs, job)


@routes.get(
    "/jobs/{id}/events",
    summary="Its progress as server-sent events",
    description="Each event is the whole state, without the answer: `event: progress`, and at the end the status. "
    "With `Last-Event-ID` only what happened since is sent; 204 if it had ended then.",
    response_class=Response,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "The last event was sent already"},
        **documents.errors(401, 403, 404, 503),
    },
)
async def events(id: Id, jobs: TheJobs, owner: Owner, last_event_id: Annotated[str, Header()] = "") -> Response:
    job = await _require(jobs, id, owner)
    if last_event_id == END:
        return Response(status_code=204)
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_events(jobs, job, last_event_id), media_type="text/event-stream", headers=headers)


async def _events(jobs: Jobs, job: StoredJob, last: str) -> AsyncGenerator[str, None]:
    """A state is sent once: its id is made of what has happened, and says the same after the server was restarted."""
    quiet_s = 0.0
    found: StoredJob | None = job
    while found:
        run = jobs.run_of(job.id) if found.open else None
        state = job_json(found, run)
        id = _event_id(state)
        if id != last:
            last, quiet_s = id, 0.0
            kind = "progress" if found.open else state["status"]
            yield f"id: {id}\nevent: {kind}\ndata: {json.dumps(state)}\n\n"
        if not found.open:
            return
        if quiet_s >= KEEP_ALIVE_S:
            quiet_s = 0.0
            yield ": keep-alive\n\n"
        wait_s = LOOK_S if run else 8 * LOOK_S
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await jobs.stopping.wait()
                return  # its client asks the next server
        quiet_s += wait_s
        if jobs.run_of(job.id) is None:
            found = await jobs.blocking(jobs.store.get, job.id)


def _event_id(state: dict[str, Any]) -> str:
    if state["ended"] is not None:
        return END
    progress = state["progress"]
    return f"{state['status']}-{progress['step']}-{progress['pictures_done']}" if progress else state["status"]


async def _job_answer(jobs: Jobs, job: StoredJob) -> Response:
    answer = None if job.open else await jobs.blocking(jobs.store.answer, job.id)
    run = jobs.run_of(job.id)
    body = await asyncio.to_thread(lambda: json.dumps(job_json(job, run, answer)))
    return Response(body, media_type="application/json")


async def _require(jobs: Jobs, id: str, owner: str | None) -> StoredJob:
    """Raises JobNotFound."""
    if job := await jobs.blocking(jobs.store.get, id, owner):
        return job
    raise JobNotFound(
        f"you have no job {id[:100]!r}; it may have expired. GET /v1/jobs lists them. A job is a drawing request with "
        "`Prefer: respond-async` or `Idempotency-Key`.",
        param="id",
    )


def _place(before: str | None) -> tuple[float, str] | None:
    if not before:
        return None
    created, _, id = before.partition("_")
    try:
        time = float(created)
        if time == time and abs(time) < 1e12 and id.isalnum():
            return time, id
    except ValueError:
        pass
    raise InvalidRequest(f"before: {before[:100]!r}; send the `next` of the previous page", param="before")
