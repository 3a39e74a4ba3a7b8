"""Files and batches as JSON, and their description in OpenAPI."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from sfumato.api.batches.tables import StoredBatch, StoredFile

WINDOW = "24h"
WINDOW_S = 86_400.0
"""Seconds from its creation to the expiry of a batch."""


class FileState(BaseModel):
    """A stored file."""

    id: str
    object: str
    bytes: int
    created_at: int = Field(description="Seconds since 1970.")
    expires_at: int = Field(description="When it will be deleted.")
    filename: str
    purpose: str = Field(description="batch, batch_output or vision.")
    status: str


class FilePage(BaseModel):
    """One page of files."""

    object: str
    data: list[FileState]
    has_more: bool
    first_id: str | None
    last_id: str | None = Field(description="Value of `after` for the next page.")


class FileDeleted(BaseModel):
    """What became of it."""

    id: str
    object: str
    deleted: bool


class BatchFault(BaseModel):
    """What is wrong with a line of the input."""

    line: int | None
    code: str
    message: str
    param: str | None


class BatchFaults(BaseModel):
    """All that is wrong with it, up to a hundred."""

    object: str
    data: list[BatchFault]


class RequestCounts(BaseModel):
    """How many lines there are, and have ended."""

    total: int
    completed: int
    failed: int


class BatchState(BaseModel):
    """A batch."""

    id: str
    object: str
    endpoint: str
    model: str | None = Field(description="The model that its lines name.")
    input_file_id: str
    completion_window: str
    status: str = Field(description="failed, in_progress, completed, expired, cancelling or cancelled.")
    output_file_id: str | None = Field(description="The answers with status 200, once it has ended.")
    error_file_id: str | None = Field(description="All other lines, once it has ended.")
    errors: BatchFaults | None = Field(description="Why it failed before anything was drawn.")
    created_at: int = Field(description="Seconds since 1970, as all `..._at`.")
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchPage(BaseModel):
    """One page of batches, newest first."""

    object: str
    data: list[BatchState]
    has_more: bool
    first_id: str | None
    last_id: str | None = Field(description="Value of `after` for the next page.")


def file_json(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created),
        "expires_at": int(file.expires),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def batch_json(batch: StoredBatch) -> dict[str, Any]:
    ended = _whole(batch.ended)
    at = {f"{state}_at": ended if batch.state == state else None for state in ("completed", "failed", "expired")}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "input_file_id": batch.input_file,
        "completion_window": WINDOW,
        "status": batch.state,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "created_at": int(batch.created),
        "in_progress_at": None if batch.state == "failed" else int(batch.created),
        "expires_at": int(batch.expires),
        "finalizing_at": None if batch.state == "failed" else ended,
        **at,
        "cancelling_at": _whole(batch.cancelling),
        "cancelled_at": ended if batch.state == "cancelled" else None,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": dict(batch.details) or None,
    }


def page_json(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    ids = [each["id"] for each in data]
    return {
        "object": "list",
        "data": data,
        "has_more": more,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
