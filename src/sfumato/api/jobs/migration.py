"""Brings a table of jobs that an earlier version made up to date: it had no column `route`.

Servers of both versions may use it at the same time: the earlier one names the columns that it reads and writes, and
the new one has a default. A clip which that one stores meanwhile is found by its id, and is missing in the list of
clips for good.
"""

from __future__ import annotations

import json

import sqlalchemy as sql
from sqlalchemy.schema import CreateColumn

from sfumato.api.jobs.tables import CLIPS, JOBS, JOBS_BY_ROUTE, TABLES, route_of

LOCK = "the tables of jobs"
"""Name of the transaction in which they are made and changed; see `JobStore.begin`."""


def is_current(connection: sql.Connection) -> bool:
    """Whether all tables are there, and as they should be. Writes nothing: the database may be read-only."""
    return TABLES.tables.keys() <= set(sql.inspect(connection).get_table_names()) and _has_route(connection)


def migrate(connection: sql.Connection) -> None:
    """Add the column and fill it, unless it is there: another server may have done so meanwhile.

    Only the rows of clips are written, as nothing else is searched: others have pictures in them, and the transaction
    would need as much room as the whole database.
    """
    if _has_route(connection):
        return
    column = CreateColumn(JOBS.c.route).compile(connection)
    connection.execute(sql.text(f"ALTER TABLE {JOBS.name} ADD COLUMN {column}"))
    maybe = sql.select(JOBS.c.id, JOBS.c.request).where(JOBS.c.request.contains(CLIPS))
    clips = [id for id, request in connection.execute(maybe) if route_of(json.loads(request)) == CLIPS]
    for id in clips:
        connection.execute(sql.update(JOBS).where(JOBS.c.id == id).values(route=CLIPS))
    JOBS_BY_ROUTE.create(connection)


def _has_route(connection: sql.Connection) -> bool:
    return JOBS.c.route.name in {column["name"] for column in sql.inspect(connection).get_columns(JOBS.name)}
