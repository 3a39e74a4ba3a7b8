"""Jobs as JSON, and their description in OpenAPI."""

from __future__ import annotations

import base64
import json
from typing import Any

from pydantic import BaseModel, Field

from sfumato.api.http.documents import ProgressState
from sfumato.api.jobs.run import Run
from sfumato.api.jobs.tables import Answer, StoredJob
from sfumato.api.progress import progress_json

TEXTS = ("text/event-stream", "application/x-ndjson")


class JobAnswer(BaseModel):
    """What the request would have been answered without `Prefer: respond-async`."""

    status_code: int
    headers: dict[str, str]
    body: Any = Field(description="JSON; of a stream its text; of a file its bytes in base64.")
    encoding: str = Field(description="json, text or base64.")


class JobState(BaseModel):
    """A stored request."""

    id: str
    object: str
    status: str = Field(description="queued, drawing, completed, failed or cancelled.")
    created: float = Field(description="When it was accepted, in seconds since 1970.")
    ended: float | None = Field(description="The same of its end.")
    method: str
    path: str
    progress: ProgressState | None = Field(description="While the server that answers carries it out.")
    response: JobAnswer | None = Field(description="Once it has ended; null in lists.")


class JobPage(BaseModel):
    """One page of jobs, newest first."""

    object: str
    data: list[JobState]
    has_more: bool
    next: str | None = Field(description="Value of `before` for the next page.")


def job_json(job: StoredJob, run: Run | None = None, answer: Answer | None = None) -> dict[str, Any]:
    """`run`: what this process carries out of it, if it does."""
    progress = run.repeatable.job.progress() if run and run.repeatable.job else None
    status = job.state
    if job.open:
        status = "queued" if progress is None or progress.state == "queued" else "drawing"
    return {
        "id": job.id,
        "object": "job",
        "status": status,
        "created": job.created,
        "ended": job.ended,
        "method": job.request["method"],
        "path": job.request["path"].removeprefix(job.request["root_path"]),
        "progress": progress_json(progress) if progress and job.open else None,
        "response": _answer_json(answer) if answer else None,
    }


def _answer_json(answer: Answer) -> dict[str, Any]:
    """Blocks for large answers."""
    headers = dict(answer.headers)
    kind = headers.get("content-type", "").partition(";")[0]
    body: Any
    if kind == "application/json":
        body, encoding = json.loads(answer.body), "json"
    elif kind in TEXTS:
        body, encoding = answer.body.decode(), "text"
    else:
        body, encoding = base64.b64encode(answer.body).decode(), "base64"
    return {"status_code": answer.status, "headers": headers, "body": body, "encoding": encoding}
