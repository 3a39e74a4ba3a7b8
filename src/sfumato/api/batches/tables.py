"""The tables of files and batches, in the database of jobs.

A batch is there once all its lines are. A line is to a batch what a row of `jobs` is to a request: its
body until it has ended, then its answer. Both files that a batch returns are its lines' answers, in order, so nothing
is copied when it ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from sfumato.api.jobs.tables import TABLES, StoredJob

IN_PROGRESS, CANCELLING = "in_progress", "cancelling"
BATCH_PURPOSE, VISION = "batch", "vision"
"""Of uploaded files: the input of a batch, and a source picture."""
OPEN = (IN_PROGRESS, CANCELLING)
"""States of a batch that has not ended; others are failed, completed, expired and cancelled."""

VALIDATING = "validating"
"""State of a batch whose lines are still being inserted: nobody sees it, and it goes with its server."""

CHUNK = 1000
"""Lines that are written in one transaction: SQLite has one writer at a time, and jobs must not wait for 50,000."""

FILES = sql.Table(
    "files",
    TABLES,
    sql.Column("id", sql.String(64), primary_key=True),
    sql.Column("caller", sql.String(255), nullable=False),
    sql.Column("purpose", sql.String(32), nullable=False),
    sql.Column("filename", sql.String(255), nullable=False),
    sql.Column("created", sql.Double, nullable=False),
    sql.Column("expires", sql.Double, nullable=False),
    sql.Column("bytes", sql.BigInteger, nullable=False),
    sql.Column("batch", sql.String(64)),
    sql.Column("failed", sql.Boolean),
    sql.Column("content", sql.LargeBinary),
    sql.Index("files_newest", "created", "id"),
    sql.Index("files_by_expiry", "expires"),
)
"""An uploaded file has `content`; one that a batch returns has `batch`, and whether its lines are the failed ones."""

BATCHES = sql.Table(
    "batches",
    TABLES,
    sql.Column("id", sql.String(64), primary_key=True),
    sql.Column("caller", sql.String(255), nullable=False),
    sql.Column("secret", sql.String(32), nullable=False),
    sql.Column("server", sql.String(255), nullable=False),
    sql.Column("state", sql.String(16), nullable=False),
    sql.Column("created", sql.Double, nullable=False),
    sql.Column("expires", sql.Double, nullable=False),
    sql.Column("cancelling", sql.Double),
    sql.Column("ended", sql.Double),
    sql.Column("endpoint", sql.String(64), nullable=False),
    sql.Column("input_file", sql.String(64), nullable=False),
    sql.Column("keep_s", sql.BigInteger, nullable=False),
    sql.Column("model", sql.Text),
    sql.Column("details", sql.Text, nullable=False),
    sql.Column("errors", sql.Text, nullable=False),
    sql.Column("request", sql.Text, nullable=False),
    sql.Column("output_file", sql.String(64)),
    sql.Column("error_file", sql.String(64)),
    sql.Column("completed", sql.BigInteger, nullable=False),
    sql.Column("failed", sql.BigInteger, nullable=False),
    sql.Column("total", sql.BigInteger, nullable=False),
    sql.Index("batches_by_state", "state", "created"),
    sql.Index("batches_newest", "created", "id"),
)
"""`details` is the caller's `metadata`, as JSON; `errors` and `request` are JSON, too. `completed` and `failed` count
once it has ended. `keep_s`: seconds that its files are kept after its end."""

LINES = sql.Table(
    "lines",
    TABLES,
    sql.Column("batch", sql.String(64), primary_key=True),
    sql.Column("position", sql.BigInteger, primary_key=True, autoincrement=False),
    sql.Column("failed", sql.Boolean),
    sql.Column("custom_id", sql.Text, nullable=False),
    sql.Column("bytes", sql.BigInteger, nullable=False),
    sql.Column("body", sql.LargeBinary),
    sql.Column("answer", sql.LargeBinary),
    sql.Index("lines_by_end", "batch", "failed", "bytes"),
)
"""`failed` is null until the line has ended. `bytes` are those of `body`, then of `answer`, a line of the output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A row, without the content."""

    id: str
    caller: str
    purpose: str
    filename: str
    created: float
    expires: float
    bytes: int
    batch: str | None = None
    failed: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A request of a batch. `body` is JSON."""

    position: int
    custom_id: str
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBatch:
    """A row. Times are in seconds since 1970."""

    id: str
    caller: str
    secret: str
    server: str
    state: str
    created: float
    expires: float
    cancelling: float | None = None
    ended: float | None = None
    endpoint: str
    input_file: str
    keep_s: int
    model: str | None
    details: Mapping[str, str]
    errors: list[dict[str, Any]]
    request: Mapping[str, Any]
    """The ASGI scope of its lines, as far as it matters."""
    output_file: str | None = None
    error_file: str | None = None
    completed: int = 0
    failed: int = 0
    total: int

    def job(self, position: int) -> StoredJob:
        """A line as a job: the same each time, so what would be random of it is, too. It stands in no table of jobs."""
        id = f"{self.id}-{position}"
        return StoredJob(
            id=id,
            caller=self.caller,
            fingerprint="",
            secret=hashlib.sha256(f"{self.secret}\0{position}".encode()).hexdigest()[:32],
            created=self.created,
            respond_async=True,
            server=self.server,
            request=dict(self.request) | {"request_id": id},
        )
