"""The database of jobs: one row for each accepted request, with its answer once it has one.

A row is committed before anything is promised or drawn, and its end is one transaction with its answer. Everything here
blocks, and raises JobsUnavailable if the database cannot be used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite

from sfumato import disk
from sfumato.api.jobs import migration, servers
from sfumato.api.jobs.tables import HEAD, JOBS, OPEN, SERVERS, TABLES, Answer, StoredJob, job_of, row_of
from sfumato.config.addresses import database_fault
from sfumato.errors import JobsUnavailable
from sfumato.settings import Settings

log = logging.getLogger(__name__)

LEASE_S = 30.0
"""Seconds without a sign of life after which a server on another machine counts as dead. Their clocks must agree to
within half of it."""

LOCKED_S = 5
"""Seconds to wait for SQLite's file while another process writes."""

CONNECT_S = 5
"""Seconds to wait for a connection to PostgreSQL."""

WAL_BYTES = 2**24
"""What SQLite's log shrinks to once a larger one was written into the database."""

VACUUM_PAGES = 1000
"""Pages of SQLite's file, of 4 KiB, that are given back to the disk in one transaction."""

LOW_WATER = 0.95
"""Fraction of the limit to shrink to once it is exceeded."""

INSERTS: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
"""Of each kind of database: an insert that can update the row that is there already."""


def _begin_immediate(connection: sql.Connection, _: str) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _advisory_lock(connection: sql.Connection, name: str) -> None:
    """Until the end of the transaction. A collision of two names only makes one wait."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
    connection.execute(sql.select(sql.func.pg_advisory_xact_lock(number)))


ALONE: Mapping[str, Callable[[sql.Connection, str], None]] = {
    "sqlite": _begin_immediate,
    "postgresql": _advisory_lock,
}
"""Of each kind of database: how others are kept out of a transaction."""


class JobStore:
    """Blocks: call it from a thread. `url` is an SQLAlchemy URL; tables are created on first use."""

    def __init__(self, url: str, *, max_age_s: float, max_bytes: int) -> None:
        self.server = servers.new_name()
        """Of this process; it stands in the rows that it carries out."""
        self.max_age_s = max_age_s
        """How long after its end a job is stored."""
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._ready = False
        try:
            psycopg = url.startswith(("postgresql://", "postgresql+psycopg"))
            limits = {"connect_timeout": CONNECT_S} if psycopg and "connect_timeout=" not in url else {}
            self.engine = sql.create_engine(url, connect_args=limits, pool_pre_ping=not url.startswith("sqlite"))
        except (sql.exc.ArgumentError, sql.exc.NoSuchModuleError, ModuleNotFoundError, ValueError) as error:
            raise ValueError(f"database: {database_fault(error)}") from None
        if self.engine.dialect.name not in INSERTS:
            raise ValueError(f"database: {self.engine.dialect.name}; {' and '.join(INSERTS)} are supported")
        if self.engine.dialect.name == "sqlite":
            if self.engine.url.database in (None, "", ":memory:"):
                raise ValueError(f"database: {url} keeps nothing; sqlite:///FILE is valid")
            sql.event.listen(self.engine, "connect", _sqlite)

    @classmethod
    def of(cls, settings: Settings) -> JobStore:
        """From the settings. Raises ValueError for a URL that SQLAlchemy does not accept."""
        url = settings.database or f"sqlite:///{(settings.data / 'jobs.db').absolute()}"
        return cls(url, max_age_s=settings.jobs_max_age_h * 3600, max_bytes=settings.jobs_max_mb * 2**20)

    def accept(self, job: StoredJob, body: bytes) -> StoredJob | None:
        """Store a new job for this server. Returns the job that has its key already, if there is one, and stores none.

        Once it has returned None, the job survives a power cut.
        """
        row = row_of(job) | {"body": body, "bytes": len(body), "server": self.server}
        try:
            with self.begin() as connection:
                if job.key and (found := self._by_key(connection, job.key)):
                    return found
                self.sign_of_life(connection)
                connection.execute(sql.insert(JOBS), [row])
        except _Taken:  # by another request, since it was looked up
            with self.begin() as connection:
                if job.key and (found := self._by_key(connection, job.key)):
                    return found
            raise JobsUnavailable("Idempotency-Key: it is being used by another request; try again") from None
        return None

    def has_key(self, key: str) -> bool:
        """Whether a job has that key."""
        with self.begin() as connection:
            return self._by_key(connection, key) is not None

    def get(self, id: str, caller: str | None = None) -> StoredJob | None:
        """The job of that id (and caller, if one is given), or None."""
        if not id.isalnum():  # PostgreSQL takes no NUL
            return None
        of_caller = [] if caller is None else [JOBS.c.caller == caller]
        with self.begin() as connection:
            row = connection.execute(sql.select(*HEAD).where(JOBS.c.id == id, *of_caller)).mappings().first()
        return job_of(row) if row else None

    def body(self, id: str) -> bytes | None:
        """The body of the request of a job of this server; None if it has ended, or is another's."""
        mine = (JOBS.c.id == id, JOBS.c.state == OPEN, JOBS.c.server == self.server)
        with self.begin() as connection:
            row = connection.execute(sql.select(JOBS.c.body).where(*mine)).first()
        return bytes(row[0]) if row else None

    def answer(self, id: str) -> Answer | None:
        """The answer of a job that has ended; None if it has not, or has expired."""
        columns = (JOBS.c.status, JOBS.c.headers, JOBS.c.answer)
        with self.begin() as connection:
            row = connection.execute(sql.select(*columns).where(JOBS.c.id == id, JOBS.c.state != OPEN)).first()
        return Answer(row[0], [(name, value) for name, value in json.loads(row[1])], bytes(row[2])) if row else None

    def page(
        self,
        caller: str | None,
        *,
        before: tuple[float, str] | None,
        limit: int,
        route: str = "",
        ascending: bool = False,
    ) -> tuple[list[StoredJob], bool]:
        """Jobs (None: everybody's), newest first, and whether there are more.

        `route`: only requests of that one (`tables.route_of`). `ascending`: oldest first, and `before` is what comes
        before them.
        """
        clauses = [] if caller is None else [JOBS.c.caller == caller]
        if route:
            clauses.append(JOBS.c.route == route)
        place = sql.tuple_(JOBS.c.created, JOBS.c.id)
        if before:
            clauses.append(place > before if ascending else place < before)
        order = [column if ascending else column.desc() for column in (JOBS.c.created, JOBS.c.id)]
        query = sql.select(*HEAD).where(*clauses).order_by(*order)
        with self.begin() as connection:
            rows = connection.execute(query.limit(limit + 1)).mappings().all()
        return [job_of(row) for row in rows[:limit]], len(rows) > limit

    def end(
        self, id: str, state: str, answer: Answer, then: Callable[[sql.Connection], None] = lambda connection: None
    ) -> bool:
        """Store the answer of an open job of this server; False if it has ended already, or is another's now.

        `then` is part of the transaction, if it does.
        """
        values = {
            "state": state,
            "ended": time.time(),
            "status": answer.status,
            "headers": json.dumps(list(answer.headers)),
            "answer": answer.body,
            "body": None,
            "bytes": len(answer.body),
        }
        mine = (JOBS.c.id == id, JOBS.c.state == OPEN, JOBS.c.server == self.server)
        with self.begin() as connection:
            if not connection.execute(sql.update(JOBS).where(*mine).values(values)).rowcount:
                return False
            then(connection)
        return True

    def promise(self, id: str) -> None:
        """Note that a client of a job is told 202."""
        with self.begin() as connection:
            connection.execute(sql.update(JOBS).where(JOBS.c.id == id, JOBS.c.state == OPEN).values(respond_async=True))

    def forget(self, id: str) -> None:
        """Delete an open job of this server: nothing was promised of it."""
        mine = (JOBS.c.id == id, JOBS.c.state == OPEN, JOBS.c.server == self.server)
        with self.begin() as connection:
            connection.execute(sql.delete(JOBS).where(*mine))

    def delete(self, id: str) -> None:
        """Delete a job, whatever its state."""
        with self.begin() as connection:
            connection.execute(sql.delete(JOBS).where(JOBS.c.id == id))

    def cancel(self, id: str) -> None:
        """Let the server that carries it out know that it should end."""
        with self.begin() as connection:
            connection.execute(sql.update(JOBS).where(JOBS.c.id == id, JOBS.c.state == OPEN).values(cancelled=True))

    def beat(self) -> set[str]:
        """Say that this server lives; ids of its jobs that should end."""
        mine = (JOBS.c.state == OPEN, JOBS.c.server == self.server, JOBS.c.cancelled)
        with self.begin() as connection:
            self.sign_of_life(connection)
            return set(connection.execute(sql.select(JOBS.c.id).where(*mine)).scalars())

    def claim(self, running: Collection[str]) -> list[StoredJob]:
        """Open jobs that nobody carries out, oldest first: from now on they are this server's."""
        with self.begin() as connection:
            found = connection.execute(sql.select(*HEAD).where(JOBS.c.state == OPEN).order_by(JOBS.c.created))
            open_jobs = [job_of(row) for row in found.mappings()]
            if not open_jobs:
                return []
            seen = {row.name: row.seen for row in connection.execute(sql.select(SERVERS))}
        claimed = []
        for job in open_jobs:
            left = job.id not in running if job.server == self.server else not lives(job.server, seen)
            if left and self._take_over(job):
                claimed.append(replace(job, server=self.server, lives=job.lives + 1))
        return claimed

    def _take_over(self, job: StoredJob) -> bool:
        theirs = (JOBS.c.id == job.id, JOBS.c.state == OPEN, JOBS.c.server == job.server)
        values = {"server": self.server, "lives": job.lives + 1}
        with self.begin() as connection:
            self.sign_of_life(connection)
            return bool(connection.execute(sql.update(JOBS).where(*theirs).values(values)).rowcount)

    def expire(self) -> int:
        """Delete ended jobs that are too old, then until the total fits; returns how many were deleted."""
        now = time.time()
        with self.begin() as connection:
            old = (JOBS.c.state != OPEN, JOBS.c.ended < now - self.max_age_s)
            deleted = connection.execute(sql.delete(JOBS).where(*old)).rowcount
            names = connection.execute(sql.select(SERVERS)).all()
            if gone := [row.name for row in names if not lives(row.name, {row.name: row.seen})]:
                connection.execute(sql.delete(SERVERS).where(SERVERS.c.name.in_(gone)))
            total = int(connection.execute(sql.select(sql.func.sum(JOBS.c.bytes))).scalar() or 0)
            if total > self._max_bytes:
                columns = sql.select(JOBS.c.id, JOBS.c.caller, JOBS.c.bytes).where(JOBS.c.state != OPEN)
                ended = [(row.id, row.caller, row.bytes) for row in connection.execute(columns.order_by(JOBS.c.ended))]
                surplus = _surplus(ended, total - int(self._max_bytes * LOW_WATER))
                for id in surplus:
                    connection.execute(sql.delete(JOBS).where(JOBS.c.id == id))
                deleted += len(surplus)
        if deleted:
            self.shrink()
        return deleted

    def shrink(self) -> None:
        """Give free pages of SQLite's file back to the disk, in portions: others may write in between."""
        if self.engine.dialect.name != "sqlite":
            return
        with self.begin() as connection:
            file: Any = connection.connection.driver_connection
            (free,) = file.execute("PRAGMA freelist_count").fetchone()
            for _ in range(0, free, VACUUM_PAGES):
                file.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")  # `execute` would free one page

    def leave(self) -> None:
        """This server carries out nothing any more: others, and the next one here, may take its open jobs at once."""
        with self.begin() as connection:
            connection.execute(sql.delete(SERVERS).where(SERVERS.c.name == self.server))

    def close(self) -> None:
        self.engine.dispose()

    def _by_key(self, connection: sql.Connection, key: str) -> StoredJob | None:
        """Deletes it if it has expired."""
        row = connection.execute(sql.select(*HEAD).where(JOBS.c.key == key)).mappings().first()
        if row and row["ended"] is not None and row["ended"] < time.time() - self.max_age_s:
            connection.execute(sql.delete(JOBS).where(JOBS.c.id == row["id"]))
            return None
        return job_of(row) if row else None

    def sign_of_life(self, connection: sql.Connection) -> None:
        seen = INSERTS[self.engine.dialect.name](SERVERS).values(name=self.server, seen=time.time())
        connection.execute(seen.on_conflict_do_update(index_elements=["name"], set_={"seen": seen.excluded.seen}))

    def _create_tables(self) -> None:
        file = self.engine.url.database or ""
        if self.engine.dialect.name == "sqlite" and not file.startswith("file:"):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            disk.sync_folder(Path(file).parent)  # SQLite syncs what is in it
        with self.engine.begin() as connection:
            if migration.is_current(connection):
                return
        with self.engine.begin() as connection:
            ALONE[self.engine.dialect.name](connection, migration.LOCK)  # other servers may start just now
            TABLES.create_all(connection)
            migration.migrate(connection)

    @contextmanager
    def begin(self, *, alone: str = "") -> Iterator[sql.Connection]:
        """A transaction, whose errors are JobsUnavailable; `_Taken` for a key or an id that exists already.

        `alone`: a name; no other transaction with that name reads between what this one reads and what it writes. In
        SQLite nobody else writes at all.
        """
        try:
            with self._lock:
                if not self._ready:
                    self._create_tables()
                    self._ready = True
            with self.engine.begin() as connection:
                if alone:
                    ALONE[self.engine.dialect.name](connection, alone)
                yield connection
        except sql.exc.IntegrityError as error:
            raise _Taken from error
        except (OSError, sqlite3.Error, sql.exc.SQLAlchemyError) as error:
            # The cause may name the database's host: for the operator alone.
            log.warning("the database of jobs cannot be used: %s", getattr(error, "orig", None) or error)
            raise JobsUnavailable(
                "the database of jobs cannot be used: nothing was accepted. Try again later, or send the request "
                "without `Prefer: respond-async` and `Idempotency-Key`. The operator's remedies: free space on its "
                "disk, its permissions, the setting database; the server's log has the cause."
            ) from error


class _Taken(Exception):
    """A row with this key exists already."""


def lives(server: str, seen: Mapping[str, float]) -> bool:
    return not servers.has_died(server) and time.time() - seen.get(server, 0.0) < LEASE_S


def _surplus(ended: Sequence[tuple[str, str, int]], size: int) -> list[str]:
    """Ids to delete until `size` bytes are free: (id, caller, bytes), the oldest of the caller that has most first.

    The newest of all stays.
    """
    of_caller: dict[str, list[tuple[str, int]]] = {}
    for id, caller, count in ended[:-1]:
        of_caller.setdefault(caller, []).append((id, count))
    totals = {caller: sum(count for _, count in jobs) for caller, jobs in of_caller.items()}
    chosen: list[str] = []
    nexts = dict.fromkeys(of_caller, 0)
    while size > 0 and totals:
        caller = max(totals, key=lambda each: totals[each])
        id, count = of_caller[caller][nexts[caller]]
        nexts[caller] += 1
        chosen.append(id)
        size -= count
        totals[caller] -= count
        if nexts[caller] == len(of_caller[caller]):
            del totals[caller]
    return chosen


def _sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={LOCKED_S * 1000}")
    if cursor.execute("PRAGMA page_count").fetchone() == (0,):  # a new file
        cursor.execute("PRAGMA auto_vacuum=INCREMENTAL")  # see `expire`
    cursor.execute("PRAGMA journal_mode=WAL")  # readers do not wait for a writer
    cursor.execute(f"PRAGMA journal_size_limit={WAL_BYTES}")
    cursor.execute("PRAGMA secure_delete=OFF")  # Debian's default: to delete would write, which a full disk refuses
    cursor.execute("PRAGMA synchronous=FULL")  # what is committed survives a power cut
    cursor.close()
