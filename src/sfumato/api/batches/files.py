"""Stored files: those that callers upload, and those that batches return. Everything here blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sql

from sfumato.api.batches.tables import BATCHES, CHUNK, FILES, LINES, OPEN, VALIDATING, StoredFile
from sfumato.api.jobs.store import JobStore
from sfumato.errors import InvalidRequest, RequestTooLarge

MAX_FILES = 1000
"""Of a caller."""

PIECE = 2**22
"""Bytes of an uploaded file that are read and sent at once; of a batch's answers at least one line."""

_HEAD = [column for column in FILES.c if column.name != "content"]


class FileStore:
    """In the database of jobs. Raises JobsUnavailable if it cannot be used. `max_bytes`: of one caller's files."""

    def __init__(self, jobs: JobStore, *, max_bytes: int) -> None:
        self._jobs = jobs
        self.max_bytes = max_bytes

    def add(self, file: StoredFile, content: bytes) -> None:
        """Once it has returned, the file survives a power cut.

        Raises RequestTooLarge if its caller's files take too much room, InvalidRequest if there are too many.
        """
        with self._jobs.begin(alone=file.caller) as connection:
            mine = FILES.c.caller == file.caller
            count = connection.execute(sql.select(sql.func.count()).select_from(FILES).where(mine)).scalar_one()
            if count >= MAX_FILES:
                raise InvalidRequest(f"file: you have {count} files, which is the most; delete some", param="file")
            used = stored_bytes(connection, file.caller)
            if used + len(content) > self.max_bytes:
                raise RequestTooLarge(
                    f"file: {len(content)} bytes; your files and batches take {used} of {self.max_bytes} bytes (the "
                    "setting files_max_mb). Delete some files",
                    param="file",
                )
            row = {column.name: getattr(file, column.name) for column in _HEAD}
            connection.execute(sql.insert(FILES), [row | {"content": content}])

    def get(self, id: str, caller: str | None) -> StoredFile | None:
        """`caller`: None finds everybody's."""
        if "\0" in id:  # PostgreSQL takes no NUL
            return None
        clauses = [FILES.c.id == id] + ([] if caller is None else [FILES.c.caller == caller])
        with self._jobs.begin() as connection:
            row = connection.execute(sql.select(*_HEAD).where(*clauses)).mappings().first()
        return StoredFile(**row) if row else None

    def page(
        self, caller: str | None, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[StoredFile], bool]:
        """Files of a caller (None: everybody's), and whether there are more. `after`: the id of the last one seen."""
        if after and "\0" in after:  # PostgreSQL takes no NUL
            raise unknown_place(after)
        if purpose and "\0" in purpose:
            return [], False
        clauses = [] if caller is None else [FILES.c.caller == caller]
        if purpose:
            clauses.append(FILES.c.purpose == purpose)
        place = sql.tuple_(FILES.c.created, FILES.c.id)
        order = (FILES.c.created.desc(), FILES.c.id.desc()) if newest_first else (FILES.c.created, FILES.c.id)
        with self._jobs.begin() as connection:
            if after:
                seen = connection.execute(sql.select(FILES.c.created, FILES.c.id).where(FILES.c.id == after)).first()
                if seen is None:
                    raise unknown_place(after)
                clauses.append(place < tuple(seen) if newest_first else place > tuple(seen))
            query = sql.select(*_HEAD).where(*clauses).order_by(*order).limit(limit + 1)
            rows = connection.execute(query).mappings().all()
        return [StoredFile(**row) for row in rows[:limit]], len(rows) > limit

    def content(self, id: str) -> bytes | None:
        """Of an uploaded file; None if it is there no more."""
        with self._jobs.begin() as connection:
            row = connection.execute(sql.select(FILES.c.content).where(FILES.c.id == id)).first()
        return bytes(row[0]) if row and row[0] is not None else None

    def pieces(self, file: StoredFile) -> Iterator[bytes]:
        """Its content, a piece at a time; it breaks off if the file is deleted meanwhile."""
        if file.batch is None:
            for start in range(1, file.bytes + 1, PIECE):  # SQL counts from 1
                piece = sql.select(sql.func.substr(FILES.c.content, start, PIECE)).where(FILES.c.id == file.id)
                with self._jobs.begin() as connection:
                    row = connection.execute(piece).first()
                if row is None:
                    return
                yield bytes(row[0])
            return
        lines = (LINES.c.batch == file.batch, LINES.c.failed == file.failed)
        position = -1
        while True:
            query = sql.select(LINES.c.position, LINES.c.bytes).where(*lines, LINES.c.position > position)
            with self._jobs.begin() as connection:
                sizes = connection.execute(query.order_by(LINES.c.position).limit(1000)).all()
                if not sizes:
                    return
                last, size = sizes[0].position, 0
                for row in sizes:
                    size += row.bytes
                    if size > PIECE and row.position != sizes[0].position:
                        break
                    last = row.position
                within = sql.select(LINES.c.answer).where(*lines, LINES.c.position.between(position + 1, last))
                answers = connection.execute(within.order_by(LINES.c.position)).scalars().all()
            position = last
            yield b"".join(bytes(each) for each in answers)

    def delete(self, file: StoredFile) -> bool:
        """With the answers that it is made of. False if it was there no more."""
        with self._jobs.begin() as connection:
            deleted = bool(connection.execute(sql.delete(FILES).where(FILES.c.id == file.id)).rowcount)
        if file.batch is not None:
            delete_lines(self._jobs, file.batch, LINES.c.failed == file.failed)
        return deleted


def delete_lines(jobs: JobStore, batch: str, *which: Any) -> None:
    """Those of a batch for which all of `which` holds, in portions. What is left after a crash goes with the batch."""
    mine = (LINES.c.batch == batch, *which)
    some = sql.select(LINES.c.position).where(*mine).order_by(LINES.c.position).limit(CHUNK)
    deleted = CHUNK
    while deleted == CHUNK:
        with jobs.begin() as connection:
            these = (LINES.c.batch == batch, LINES.c.position.in_(some))
            deleted = connection.execute(sql.delete(LINES).where(*these)).rowcount


def stored_bytes(connection: sql.Connection, caller: str) -> int:
    """What a caller's files take, and the lines of its batches that have not ended."""
    files = sql.select(sql.func.sum(FILES.c.bytes)).where(FILES.c.caller == caller)
    batches = sql.select(BATCHES.c.id).where(BATCHES.c.caller == caller, BATCHES.c.state.in_((*OPEN, VALIDATING)))
    lines = sql.select(sql.func.sum(LINES.c.bytes)).where(LINES.c.batch.in_(batches))
    return sum(int(connection.execute(each).scalar() or 0) for each in (files, lines))


def unknown_place(after: str) -> InvalidRequest:
    return InvalidRequest(f"after: there is no {after[:100]!r}; send the last id of the previous page", param="after")
