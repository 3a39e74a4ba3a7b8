"""Stored batches and their lines. Everything here blocks, and raises JobsUnavailable if the database cannot be used."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import RowMapping

from sfumato.api.batches.files import FileStore, delete_lines, stored_bytes, unknown_place
from sfumato.api.batches.tables import (
    BATCHES,
    CANCELLING,
    CHUNK,
    FILES,
    IN_PROGRESS,
    LINES,
    OPEN,
    VALIDATING,
    Line,
    StoredBatch,
)
from sfumato.api.jobs.store import JobStore, lives
from sfumato.api.jobs.tables import SERVERS
from sfumato.api.webhooks import outbox
from sfumato.errors import JobsUnavailable, TooManyRequests

MAX_OPEN = 20
"""Batches of a caller that have not ended."""

UNDONE: Mapping[str, tuple[str, str]] = {
    "expired": ("batch_expired", "This request was not executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed before the batch was cancelled."),
    "completed": (
        "file_limit_exceeded",
        "This request was not executed: your files and batches take all the room that the setting files_max_mb allows.",
    ),
}
"""State of a batch that has ended → code and message of its lines that have not."""


class BatchStore:
    """In the database of jobs; a batch belongs to the server that accepted it, as a job does."""

    def __init__(self, jobs: JobStore, files: FileStore, *, max_age_s: float) -> None:
        self.files = files
        self._jobs = jobs
        self._max_age_s = max_age_s
        self._creating: set[str] = set()
        """Ids of batches whose lines are being inserted here."""

    @property
    def server(self) -> str:
        """Of this process; it stands in the batches that it carries out."""
        return self._jobs.server

    def create(self, batch: StoredBatch, lines: Sequence[Line]) -> None:
        """Once it has returned, the batch survives a power cut. Raises TooManyRequests for one too many."""
        self._creating.add(batch.id)
        try:
            first = replace(batch, state=VALIDATING) if lines else batch
            with self._jobs.begin(alone=batch.caller) as connection:
                if batch.state in OPEN:
                    _require_room(connection, batch.caller)
                self._jobs.sign_of_life(connection)
                connection.execute(sql.insert(BATCHES), [_row(first)])
                if batch.state not in OPEN:
                    _tell(connection, batch, batch.state)
            for start in range(0, len(lines), CHUNK):
                rows = [_line_row(batch.id, line) for line in lines[start : start + CHUNK]]
                with self._jobs.begin() as connection:
                    self._go_on(connection, batch, VALIDATING)
                    connection.execute(sql.insert(LINES), rows)
            if lines:
                with self._jobs.begin() as connection:
                    self._go_on(connection, batch, batch.state)
        finally:
            self._creating.discard(batch.id)

    def _go_on(self, connection: sql.Connection, batch: StoredBatch, state: str) -> None:
        """Raises JobsUnavailable if another server took this one for dead, and drops the batch.

        It writes the row even if `state` is what it was: nobody can take the batch before the transaction ends.
        """
        self._jobs.sign_of_life(connection)
        mine = (BATCHES.c.id == batch.id, BATCHES.c.state == VALIDATING, BATCHES.c.server == batch.server)
        if not connection.execute(sql.update(BATCHES).where(*mine).values(state=state)).rowcount:
            raise JobsUnavailable("the batch was not stored, as that took too long. Try again later.")

    def require_room(self, caller: str) -> None:
        """Raises TooManyRequests if a batch more of that caller would be one too many."""
        with self._jobs.begin() as connection:
            _require_room(connection, caller)

    def get(self, id: str, caller: str | None = None) -> StoredBatch | None:
        """The batch of that id (and caller), or None."""
        if "\0" in id:  # PostgreSQL takes no NUL
            return None
        clauses = [BATCHES.c.id == id, BATCHES.c.state != VALIDATING] + (
            [] if caller is None else [BATCHES.c.caller == caller]
        )
        with self._jobs.begin() as connection:
            row = connection.execute(sql.select(BATCHES).where(*clauses)).mappings().first()
            return self._batch(connection, row) if row else None

    def page(self, caller: str | None, *, after: str | None, limit: int) -> tuple[list[StoredBatch], bool]:
        """Batches, newest first (None: everybody's), and whether there are more. `after`: the id of the last seen."""
        if after and "\0" in after:  # PostgreSQL takes no NUL
            raise unknown_place(after)
        clauses = [BATCHES.c.state != VALIDATING] + ([] if caller is None else [BATCHES.c.caller == caller])
        with self._jobs.begin() as connection:
            if after:
                place = sql.select(BATCHES.c.created, BATCHES.c.id).where(BATCHES.c.id == after)
                if (seen := connection.execute(place).first()) is None:
                    raise unknown_place(after)
                clauses.append(sql.tuple_(BATCHES.c.created, BATCHES.c.id) < tuple(seen))
            query = sql.select(BATCHES).where(*clauses).order_by(BATCHES.c.created.desc(), BATCHES.c.id.desc())
            rows = connection.execute(query.limit(limit + 1)).mappings().all()
            return [self._batch(connection, row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, id: str, now: float) -> bool:
        """Let the server that carries it out know that it should end; False if it has, or knows already."""
        values = {"state": CANCELLING, "cancelling": now}
        with self._jobs.begin() as connection:
            mine = (BATCHES.c.id == id, BATCHES.c.state == IN_PROGRESS)
            return bool(connection.execute(sql.update(BATCHES).where(*mine).values(values)).rowcount)

    def claim(self) -> tuple[list[StoredBatch], dict[str, int]]:
        """The open batches that this server carries out, with those that nobody does any more, oldest first.

        Also, for each caller of theirs, the bytes that it may still store.
        """
        query = sql.select(BATCHES).where(BATCHES.c.state.in_((*OPEN, VALIDATING))).order_by(BATCHES.c.created)
        with self._jobs.begin() as connection:
            rows = connection.execute(query).mappings().all()
            if not rows:
                return [], {}
            seen = {row.name: row.seen for row in connection.execute(sql.select(SERVERS))}
        mine = []
        for row in rows:
            if row["state"] == VALIDATING:
                self._drop_incomplete(row, seen)
            elif row["server"] == self._jobs.server or (not lives(row["server"], seen) and self._take_over(row)):
                mine.append(_of_row(row, row["completed"], row["failed"]))
        with self._jobs.begin() as connection:
            if mine:
                self._jobs.sign_of_life(connection)
            callers = {batch.caller for batch in mine}
            room = {caller: self.files.max_bytes - stored_bytes(connection, caller) for caller in callers}
        return mine, room

    def _drop_incomplete(self, row: RowMapping, seen: Mapping[str, float]) -> None:
        """Delete a batch that nobody was told of, and whose lines nobody inserts any more."""
        id, server = row["id"], row["server"]
        if id in self._creating or (server != self._jobs.server and lives(server, seen)):
            return
        # It may be complete since the row was read, and is ours alone from now on: its server inserts no more lines.
        if self._take_over(row, (VALIDATING,)):
            delete_lines(self._jobs, id)
            with self._jobs.begin() as connection:
                connection.execute(sql.delete(BATCHES).where(BATCHES.c.id == id))

    def _take_over(self, row: RowMapping, states: Sequence[str] = OPEN) -> bool:
        theirs = (BATCHES.c.id == row["id"], BATCHES.c.state.in_(states), BATCHES.c.server == row["server"])
        with self._jobs.begin() as connection:
            self._jobs.sign_of_life(connection)
            return bool(
                connection.execute(sql.update(BATCHES).where(*theirs).values(server=self._jobs.server)).rowcount
            )

    def pending(self, id: str, after: int, limit: int) -> list[int]:
        """Positions of the next lines after that one that have not ended."""
        clauses = (LINES.c.batch == id, LINES.c.failed.is_(None), LINES.c.position > after)
        query = sql.select(LINES.c.position).where(*clauses).order_by(LINES.c.position).limit(limit)
        with self._jobs.begin() as connection:
            return list(connection.execute(query).scalars())

    def line(self, id: str, position: int) -> Line | None:
        """A line of a batch of this server; None if it has ended, or is another server's now."""
        columns = (LINES.c.custom_id, LINES.c.body)
        clauses = (LINES.c.batch == id, LINES.c.position == position, LINES.c.failed.is_(None), self._is_mine(id))
        with self._jobs.begin() as connection:
            row = connection.execute(sql.select(*columns).where(*clauses)).first()
        return Line(position=position, custom_id=row.custom_id, body=bytes(row.body)) if row else None

    def end_line(self, id: str, position: int, answer: bytes, failed: bool) -> bool:
        """Store the answer of a line of this server; False if it has ended already, or is another's now."""
        values = {"failed": failed, "answer": answer, "bytes": len(answer), "body": None}
        clauses = (LINES.c.batch == id, LINES.c.position == position, LINES.c.failed.is_(None), self._is_mine(id))
        with self._jobs.begin() as connection:
            return bool(connection.execute(sql.update(LINES).where(*clauses).values(values)).rowcount)

    def _is_mine(self, id: str) -> Any:
        mine = (BATCHES.c.id == id, BATCHES.c.state.in_(OPEN), BATCHES.c.server == self._jobs.server)
        return sql.exists().where(*mine)

    def finish(self, batch: StoredBatch, state: str, now: float) -> bool:
        """End a batch of this server: its lines that were not drawn, in portions; then its state, counts and files.

        False if it has ended already, or is another's now.
        """
        while self._end_some(batch, UNDONE[state]):
            pass
        mine = (BATCHES.c.id == batch.id, BATCHES.c.state.in_(OPEN), BATCHES.c.server == self._jobs.server)
        with self._jobs.begin() as connection:
            if not connection.execute(sql.update(BATCHES).where(*mine).values(state=state, ended=now)).rowcount:
                return False
            values: dict[str, Any] = {}
            for failed, (counted, named) in {False: ("completed", "output"), True: ("failed", "error")}.items():
                lines = (LINES.c.batch == batch.id, LINES.c.failed == failed)
                count, size = connection.execute(
                    sql.select(sql.func.count(), sql.func.sum(LINES.c.bytes)).where(*lines)
                ).one()
                values[counted] = count
                if count:
                    id = values[f"{named}_file"] = f"file-{uuid.uuid4().hex}"
                    row = {
                        "id": id, "caller": batch.caller, "purpose": "batch_output", "created": now, "failed": failed,
                        "filename": f"{batch.id}_{named}.jsonl", "expires": now + batch.keep_s, "bytes": int(size),
                        "batch": batch.id,
                    }  # fmt: skip
                    connection.execute(sql.insert(FILES), [row])
            connection.execute(sql.update(BATCHES).where(BATCHES.c.id == batch.id).values(values))
            _tell(connection, batch, state)
        return True

    def _end_some(self, batch: StoredBatch, reason: tuple[str, str]) -> int:
        """Let the next lines that have not ended say why; returns how many."""
        undone = (LINES.c.batch == batch.id, LINES.c.failed.is_(None), self._is_mine(batch.id))
        some = sql.select(LINES.c.position, LINES.c.custom_id).where(*undone).order_by(LINES.c.position).limit(CHUNK)
        place = (LINES.c.batch == batch.id, LINES.c.position == sql.bindparam("at"))
        values: dict[str, Any] = {"answer": sql.bindparam("said"), "bytes": sql.bindparam("size")}
        update = sql.update(LINES).where(*place).values(values | {"failed": True, "body": None})
        with self._jobs.begin() as connection:
            rows = connection.execute(some).all()
            answers = [output_line(batch.job(row.position).id, row.custom_id, error=reason) for row in rows]
            if rows:
                connection.execute(
                    update,
                    [
                        {"at": row.position, "said": answer, "size": len(answer)}
                        for row, answer in zip(rows, answers, strict=True)
                    ],
                )
        return len(rows)

    def expire(self, now: float) -> int:
        """Delete files that are too old, with what they are made of, and ended batches; returns how many files."""
        with self._jobs.begin() as connection:
            old = connection.execute(sql.select(FILES.c.id).where(FILES.c.expires < now)).scalars().all()
        for id in old:
            if file := self.files.get(id, None):
                self.files.delete(file)
        with self._jobs.begin() as connection:
            named = sql.exists().where(FILES.c.batch == BATCHES.c.id)
            gone = sql.select(BATCHES.c.id).where(BATCHES.c.ended < now - self._max_age_s, ~named)
            without_files = connection.execute(gone).scalars().all()
        for id in without_files:
            delete_lines(self._jobs, id)
            with self._jobs.begin() as connection:
                connection.execute(sql.delete(BATCHES).where(BATCHES.c.id == id))
        self._jobs.shrink()
        return len(old)

    def _batch(self, connection: sql.Connection, row: RowMapping) -> StoredBatch:
        """With the present counts, if it has not ended."""
        completed, failed = row["completed"], row["failed"]
        if row["state"] in OPEN:
            ended = (LINES.c.batch == row["id"], LINES.c.failed.is_not(None))
            query = sql.select(LINES.c.failed, sql.func.count()).where(*ended).group_by(LINES.c.failed)
            counts = {bool(each[0]): each[1] for each in connection.execute(query)}
            completed, failed = counts.get(False, 0), counts.get(True, 0)
        return _of_row(row, completed, failed)


def _require_room(connection: sql.Connection, caller: str) -> None:
    mine = (BATCHES.c.caller == caller, BATCHES.c.state.in_((*OPEN, VALIDATING)))
    count = connection.execute(sql.select(sql.func.count()).select_from(BATCHES).where(*mine)).scalar_one()
    if count >= MAX_OPEN:
        raise TooManyRequests(
            f"{count} of your batches have not ended, which is the most. Try again later, or cancel one.",
            retry_after=120,
        )


def _tell(connection: sql.Connection, batch: StoredBatch, state: str) -> None:
    if url := batch.request.get("webhook"):
        outbox.add(connection, url, f"batch.{state}", batch.id)


def _line_row(batch: str, line: Line) -> dict[str, Any]:
    size = len(line.body)
    return {"batch": batch, "position": line.position, "custom_id": line.custom_id, "bytes": size, "body": line.body}


def output_line(
    id: str,
    custom_id: str,
    *,
    status: int | None = None,
    body: bytes = b"null",
    error: tuple[str, str] | None = None,
) -> bytes:
    """A line of what a batch returns. `body` is JSON, of the response; `error`: code and message if there is none."""
    said = json.dumps(None if error is None else {"code": error[0], "message": error[1]}).encode()
    head = json.dumps({"id": f"batch_req_{id}", "custom_id": custom_id}).encode()[:-1]
    response = b"null"
    if status is not None:
        begin = json.dumps({"status_code": status, "request_id": id}).encode()[:-1]
        response = begin + b', "body": ' + body.replace(b"\n", b" ") + b"}"  # JSON has line breaks between its tokens
    return head + b', "response": ' + response + b', "error": ' + said + b"}\n"


def _row(batch: StoredBatch) -> dict[str, Any]:
    row = {column.name: getattr(batch, column.name) for column in BATCHES.c}
    return row | {name: json.dumps(row[name]) for name in ("details", "errors", "request")}


def _of_row(row: RowMapping, completed: int, failed: int) -> StoredBatch:
    values: dict[str, Any] = {str(name): value for name, value in row.items()}
    values |= {name: json.loads(values[name]) for name in ("details", "errors", "request")}
    return StoredBatch(**values | {"completed": completed, "failed": failed})
