"""`/v1/files`, as OpenAI's clients call it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, WithJsonSchema, field_validator
from starlette.responses import StreamingResponse

from sfumato.api.batches.batches import Batches
from sfumato.api.batches.documents import FileDeleted, FilePage, FileState, file_json, page_json
from sfumato.api.batches.tables import BATCH_PURPOSE, VISION, StoredFile
from sfumato.api.dependencies import Caller, Owner, TheService, part
from sfumato.api.fields import PLAIN
from sfumato.api.http import documents
from sfumato.api.http.content_type import BYTES
from sfumato.api.http.forms import openapi_body, reader
from sfumato.api.http.multipart import File
from sfumato.errors import FileNotStored, in_words

JSONL = "application/jsonl"
MAX_PAGE = 10_000
MAX_NAME = 255
"""Characters of a file's name."""
LEAST_S, MOST_S = 3600, 2_592_000
"""Limits of `expires_after`, in seconds: an hour and 30 days."""

TheBatches: TypeAlias = Annotated[Batches, Depends(part("batches"))]
Id: TypeAlias = Annotated[str, Path(max_length=100, description="As `POST /v1/files` or a batch says.")]

routes = APIRouter(tags=["Files"])


class ExpiresAfter(BaseModel):
    """When a file is deleted."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=LEAST_S, le=MOST_S), PLAIN]


class UploadBody(BaseModel):
    """Of `POST /v1/files`."""

    model_config = ConfigDict(extra="forbid")

    file: Annotated[InstanceOf[File], WithJsonSchema({"type": "string", "format": "binary"})] = Field(
        description="The file, with its name."
    )
    purpose: str = Field(description=f"{BATCH_PURPOSE}: the input of a batch; {VISION}: a picture, for `file_id`.")
    expires_after: ExpiresAfter | None = Field(
        None, description="`anchor` created_at, and `seconds`. Absent: the setting files_max_age_h."
    )

    @field_validator("purpose")
    @classmethod
    def _known_purpose(cls, purpose: str) -> str:
        if purpose not in (BATCH_PURPOSE, VISION):
            raise ValueError(
                f"{BATCH_PURPOSE} and {VISION} are valid; this server does nothing with files of other purposes"
            )
        return purpose

    @field_validator("file", mode="before")
    @classmethod
    def _is_file(cls, value: Any) -> Any:
        if not isinstance(value, File):
            raise ValueError("send one file, with its name, in a multipart form")
        return value


_FORM = openapi_body(UploadBody)
del _FORM["requestBody"]["content"]["application/json"]


@routes.post(
    "/files",
    summary="Upload the input of a batch, or a picture",
    openapi_extra=_FORM,
    response_model=FileState,
    responses=documents.errors(400, 401, 403, 413, 415, 503),
)
async def upload(
    body: Annotated[UploadBody, Depends(reader(UploadBody))],
    batches: TheBatches,
    service: TheService,
    caller: Caller,
) -> dict[str, Any]:
    now = time.time()
    keep_s = body.expires_after.seconds if body.expires_after else service.settings.files_max_age_h * 3600
    file = StoredFile(
        id=f"file-{uuid.uuid4().hex}",
        caller=caller,
        purpose=body.purpose,
        filename=body.file.filename[:MAX_NAME].replace("\0", ""),
        created=now,
        expires=now + keep_s,
        bytes=len(body.file),
    )
    await batches.blocking(batches.store.files.add, file, bytes(body.file))
    return file_json(file)


@routes.get(
    "/files",
    summary="The caller's files; without keys, everybody's",
    response_model=FilePage,
    responses=documents.errors(400, 401, 403, 503),
)
async def page(
    batches: TheBatches,
    owner: Owner,
    after: Annotated[str | None, Query(max_length=100, description="`last_id` of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Files per page."), PLAIN] = MAX_PAGE,
    order: Annotated[Literal["asc", "desc"], Query(description="desc: newest first.")] = "desc",
    purpose: Annotated[str | None, Query(max_length=32, description="Only these.")] = None,
) -> dict[str, Any]:
    found, more = await batches.blocking(
        batches.store.files.page, owner, purpose=purpose, after=after, limit=limit, newest_first=order == "desc"
    )
    return page_json([file_json(file) for file in found], more)


@routes.get(
    "/files/{id}",
    summary="A file's size, name and dates",
    response_model=FileState,
    responses=documents.errors(401, 403, 404, 503),
)
async def one(id: Id, batches: TheBatches, owner: Owner) -> dict[str, Any]:
    return file_json(await _require(batches, id, owner))


@routes.get(
    "/files/{id}/content",
    summary="A file's content",
    response_class=Response,
    responses={
        200: {"content": {each: {"schema": {"type": "string", "format": "binary"}} for each in (JSONL, BYTES)}},
        **documents.errors(401, 403, 404, 503),
    },
)
async def content(id: Id, batches: TheBatches, owner: Owner) -> Response:
    file = await _require(batches, id, owner)
    # The length lets a client notice that the file was deleted in the middle.
    headers = {"content-length": str(file.bytes)}
    media_type = BYTES if file.purpose == VISION else JSONL
    return StreamingResponse(_pieces(batches, file), media_type=media_type, headers=headers)


@routes.delete(
    "/files/{id}",
    summary="Delete a file. Batches that were made of it go on",
    response_model=FileDeleted,
    responses=documents.errors(401, 403, 404, 503),
)
async def delete(id: Id, batches: TheBatches, owner: Owner) -> dict[str, Any]:
    file = await _require(batches, id, owner)
    deleted = await batches.blocking(batches.store.files.delete, file)
    return {"id": id, "object": "file", "deleted": deleted}


async def _pieces(batches: Batches, file: StoredFile) -> AsyncGenerator[bytes, None]:
    pieces: Iterator[bytes] = batches.store.files.pieces(file)
    while (piece := await batches.blocking(next, pieces, b"")) != b"":
        yield piece


async def _require(batches: Batches, id: str, owner: str | None) -> StoredFile:
    """Raises FileNotStored."""
    if file := await batches.blocking(batches.store.files.get, id, owner):
        return file
    raise FileNotStored(
        f"id: you have no file {in_words(id)}; it may have expired. GET /v1/files lists them.", param="id"
    )
