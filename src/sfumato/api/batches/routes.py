"""`/v1/batches`, as OpenAI's clients call it."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from sfumato.api.batches import lines
from sfumato.api.batches.batches import Batches
from sfumato.api.batches.documents import WINDOW_S, BatchPage, BatchState, batch_json, page_json
from sfumato.api.batches.file_routes import ExpiresAfter, TheBatches
from sfumato.api.batches.tables import BATCH_PURPOSE, IN_PROGRESS, StoredBatch
from sfumato.api.dependencies import Caller, Owner, TheService, part
from sfumato.api.fields import PLAIN
from sfumato.api.http import documents
from sfumato.api.http.forms import openapi_json, reader
from sfumato.api.jobs.headers import webhook_of
from sfumato.api.jobs.run import saved_scope
from sfumato.api.webhooks.sender import MAX_URL, Webhooks
from sfumato.errors import BatchNotFound, InvalidRequest, in_words

MAX_PAGE = 100
MAX_DETAILS = 16
"""Pairs of a batch's `metadata`."""

Id: TypeAlias = Annotated[str, Path(max_length=100, description="As `POST /v1/batches` says.")]
Key: TypeAlias = Annotated[str, Field(max_length=64)]
Value: TypeAlias = Annotated[str, Field(max_length=512)]

routes = APIRouter(tags=["Batches"])


class BatchBody(BaseModel):
    """Of `POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str = Field(max_length=100, description="Of a file with the purpose batch.")
    endpoint: Literal["/v1/images/generations", "/v1/images/edits"] = Field(description="What its lines request.")
    completion_window: Literal["24h"] = Field(description="What has not ended by then is not drawn.")
    metadata: dict[Key, Value] | None = Field(None, max_length=MAX_DETAILS, description="Your own; 16 pairs of texts.")
    output_expires_after: ExpiresAfter | None = Field(
        None,
        description="`anchor` created_at, and `seconds` from the end of the batch to the end of its files. Absent: the "
        "setting files_max_age_h.",
    )


@routes.post(
    "/batches",
    summary="Draw all lines of an uploaded file, behind requests that somebody waits for",
    openapi_extra=openapi_json(BatchBody),
    response_model=BatchState,
    responses=documents.errors(400, 401, 403, 413, 415, 429, 503),
)
async def create(
    body: Annotated[BatchBody, Depends(reader(BatchBody))],
    request: Request,
    batches: TheBatches,
    service: TheService,
    webhooks: Annotated[Webhooks, Depends(part("webhooks"))],
    owner: Owner,
    caller: Caller,
    x_webhook_url: Annotated[str | None, Header(max_length=MAX_URL, description="Told when it has ended.")] = None,
) -> dict[str, Any]:
    settings, webhook = service.settings, webhooks.checked(webhook_of(request.headers))
    if "idempotency-key" in request.headers:
        raise InvalidRequest(
            "Idempotency-Key: it has no effect here; leave it out, and give each line a custom_id of its own",
            param="Idempotency-Key",
        )
    async with batches.reading:
        await batches.blocking(batches.store.require_room, caller)
        content = await _input(batches, body.input_file_id, owner)
        found, model, errors = await asyncio.to_thread(lines.read, content, body.endpoint, settings.max_text_mb * 2**20)
        del content
        now, expires_after = batches.clock(), body.output_expires_after
        batch = StoredBatch(
            id=f"batch_{uuid.uuid4().hex}",
            caller=caller,
            secret=secrets.token_hex(16),
            server=batches.store.server,
            state="failed" if errors else IN_PROGRESS,
            created=now,
            expires=now + WINDOW_S,
            ended=now if errors else None,
            endpoint=body.endpoint,
            input_file=body.input_file_id,
            keep_s=expires_after.seconds if expires_after else settings.files_max_age_h * 3600,
            model=model,
            details=body.metadata or {},
            errors=errors,
            request=_scope(request, body.endpoint) | {"webhook": webhook},
            total=0 if errors else len(found),
        )
        await batches.blocking(batches.store.create, batch, [] if errors else found)
    batches.look_now()
    return batch_json(batch)


@routes.get(
    "/batches",
    summary="The caller's batches, newest first; without keys, everybody's",
    response_model=BatchPage,
    responses=documents.errors(400, 401, 403, 503),
)
async def page(
    batches: TheBatches,
    owner: Owner,
    after: Annotated[str | None, Query(max_length=100, description="`last_id` of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Batches per page."), PLAIN] = 20,
) -> dict[str, Any]:
    found, more = await batches.blocking(batches.store.page, owner, after=after, limit=limit)
    return page_json([batch_json(batch) for batch in found], more)


@routes.get(
    "/batches/{id}",
    summary="How far a batch is, and which files have its answers",
    response_model=BatchState,
    responses=documents.errors(401, 403, 404, 503),
)
async def one(id: Id, batches: TheBatches, owner: Owner) -> dict[str, Any]:
    return batch_json(await _require(batches, id, owner))


@routes.post(
    "/batches/{id}/cancel",
    summary="End a batch within one denoising step; its files have what was drawn",
    response_model=BatchState,
    responses=documents.errors(400, 401, 403, 404, 503),
)
async def cancel(id: Id, batches: TheBatches, owner: Owner) -> dict[str, Any]:
    batch = await _require(batches, id, owner)
    if not await batches.cancel(batch) and batch.ended is not None:
        raise InvalidRequest(
            f"id: the batch is {batch.state}; only one that has not ended can be cancelled", param="id"
        )
    return batch_json(await _require(batches, id, owner))


async def _input(batches: Batches, id: str, owner: str | None) -> bytes:
    """The content of an uploaded file. Raises InvalidRequest if there is none."""
    file = await batches.blocking(batches.store.files.get, id, owner)
    content = (
        await batches.blocking(batches.store.files.content, id) if file and file.purpose == BATCH_PURPOSE else None
    )
    if content is None:
        what = f"is a file of the purpose {file.purpose}" if file else "is no file of yours; it may have expired"
        raise InvalidRequest(
            f"input_file_id: {in_words(id)} {what}. Upload one with POST /v1/files and the purpose {BATCH_PURPOSE}",
            param="input_file_id",
        )
    return content


def _scope(request: Request, endpoint: str) -> dict[str, Any]:
    """The scope of the batch's lines: as if the same client had sent each of them."""
    saved = saved_scope(request.scope, "", None)
    headers = [each for each in saved["headers"] if each[0] not in ("accept", "content-type")]
    return saved | {
        "path": saved["root_path"] + endpoint,
        "query": "",
        "headers": [*headers, ["content-type", "application/json"]],
    }


async def _require(batches: Batches, id: str, owner: str | None) -> StoredBatch:
    """Raises BatchNotFound."""
    if batch := await batches.blocking(batches.store.get, id, owner):
        return batch
    raise BatchNotFound(
        f"id: you have no batch {in_words(id)}; it may have expired. GET /v1/batches lists them.", param="id"
    )
