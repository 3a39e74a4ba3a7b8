"""The tables of jobs, and a row of them as a value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import RowMapping

OPEN = "open"
"""State of a job that has not ended; otherwise it is completed, failed or cancelled."""

MAX_ROUTE = 64
"""In characters."""

CLIPS = "/videos"
"""Route of the jobs that are clips: the only one by which jobs are searched."""

TABLES = sql.MetaData()

JOBS = sql.Table(
    "jobs",
    TABLES,
    sql.Column("id", sql.String(32), primary_key=True),
    sql.Column("caller", sql.String(255), nullable=False),
    sql.Column("key", sql.String(64), unique=True),
    sql.Column("fingerprint", sql.String(64), nullable=False),
    sql.Column("secret", sql.String(32), nullable=False),
    sql.Column("created", sql.Double, nullable=False),
    sql.Column("ended", sql.Double),
    sql.Column("state", sql.String(16), nullable=False),
    sql.Column("respond_async", sql.Boolean, nullable=False),
    sql.Column("cancelled", sql.Boolean, nullable=False),
    sql.Column("server", sql.String(255), nullable=False),
    sql.Column("lives", sql.Integer, nullable=False),
    sql.Column("bytes", sql.BigInteger, nullable=False),
    sql.Column("route", sql.String(MAX_ROUTE), nullable=False, server_default=""),
    sql.Column("request", sql.Text, nullable=False),
    sql.Column("status", sql.Integer),
    sql.Column("headers", sql.Text),
    sql.Column("body", sql.LargeBinary),
    sql.Column("answer", sql.LargeBinary),
    sql.Index("jobs_by_state", "state", "created"),
    sql.Index("jobs_newest", "created", "id"),
)
"""`key` is a digest; `created` and `ended` are seconds since 1970; `request` and `headers` are JSON. `body` is that of
the request, until the job has ended. Large columns stand last: SQLite reads the others without them."""

JOBS_BY_ROUTE = sql.Index("jobs_by_route", JOBS.c.route, JOBS.c.created, JOBS.c.id)

SERVERS = sql.Table(
    "servers",
    TABLES,
    sql.Column("name", sql.String(255), primary_key=True),
    sql.Column("seen", sql.Double, nullable=False),
)
"""Servers that carry out jobs, and when each last said so. Not a column of `jobs`: SQLite writes a row as a whole."""

HEAD = [column for column in JOBS.c if column.name not in ("body", "answer", "route")]
"""The columns that are read with every job. `route` is only searched: migrated tables have it behind the bodies."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, without the headers that every response gets."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredJob:
    """A row, without the bodies."""

    id: str
    caller: str
    key: str | None = None
    fingerprint: str
    secret: str
    created: float
    ended: float | None = None
    state: str = OPEN
    respond_async: bool
    cancelled: bool = False
    """Whether its caller wants it to end."""
    server: str
    lives: int = 1
    """How often it was begun: once, and again after each death of its server."""
    request: Mapping[str, Any]
    """Its ASGI scope, as far as it matters."""
    status: int | None = None

    @property
    def open(self) -> bool:
        return self.state == OPEN

    @property
    def request_id(self) -> str:
        return str(self.request["request_id"])


def route_of(scope: Mapping[str, Any]) -> str:
    """The path of a request without the server's prefix and version; empty for those of no fixed length."""
    route = str(scope.get("path", "")).removeprefix(scope.get("root_path", "")).removeprefix("/v1")
    return route if len(route) <= MAX_ROUTE and route.isascii() and route.isprintable() else ""


def row_of(job: StoredJob) -> dict[str, Any]:
    row = {column.name: getattr(job, column.name) for column in HEAD if column.name not in ("bytes", "headers")}
    return row | {"request": json.dumps(job.request), "route": route_of(job.request)}


def job_of(row: RowMapping) -> StoredJob:
    values: dict[str, Any] = {str(name): value for name, value in row.items() if name not in ("bytes", "headers")}
    return StoredJob(**values | {"request": json.loads(row["request"])})
