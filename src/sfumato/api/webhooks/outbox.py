"""Messages to send, in the database of jobs: each is stored in the transaction that ends what it tells of."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

import sqlalchemy as sql

from sfumato.api.jobs.store import JobStore
from sfumato.api.jobs.tables import TABLES

OF_A_HOST = 2
"""Messages that are sent to one host at the same time: one that does not answer must not hold up the others."""

WINDOW = 1000
"""Due messages among which those for hosts that are free are looked for."""

WEBHOOKS = sql.Table(
    "webhooks",
    TABLES,
    sql.Column("id", sql.String(64), primary_key=True),
    sql.Column("url", sql.Text, nullable=False),
    sql.Column("payload", sql.Text, nullable=False),
    sql.Column("attempts", sql.Integer, nullable=False),
    sql.Column("due", sql.Double, nullable=False),
    sql.Index("webhooks_due", "due"),
)
"""`due`: when it is to be sent next, in seconds since 1970. Rows are deleted once they are received, or given up."""


@dataclass(frozen=True, slots=True)
class Message:
    """A row."""

    id: str
    url: str
    payload: bytes
    attempts: int
    """How often it was sent before."""


def add(connection: sql.Connection, url: str, event: str, subject: str) -> None:
    """`event`: such as job.completed; `subject`: the id of what has ended."""
    now, id = time.time(), f"evt_{uuid.uuid4().hex}"
    payload = {
        "id": id,
        "object": "event",
        "created_at": int(now),
        "type": event,
        "timestamp": datetime.fromtimestamp(now, UTC).isoformat(),
        "data": {"id": subject},
    }
    row = {"id": id, "url": url, "payload": json.dumps(payload), "attempts": 0, "due": now}
    connection.execute(sql.insert(WEBHOOKS), [row])


def host_of(url: str) -> str:
    """In lower case."""
    return urlsplit(url).hostname or ""


class Outbox:
    """Blocks, and raises JobsUnavailable if the database cannot be used."""

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs

    def take(self, now: float, until: float, limit: int, busy: Mapping[str, int]) -> list[Message]:
        """Messages that are due, which no other server sends before `until`. `busy`: host → messages being sent."""
        query = sql.select(WEBHOOKS).where(WEBHOOKS.c.due <= now).order_by(WEBHOOKS.c.due).limit(WINDOW)
        with self._jobs.begin() as connection:
            rows = connection.execute(query).all()
        taken: list[Message] = []
        hosts = Counter(busy)
        for row in rows:
            host = host_of(row.url)
            if len(taken) == limit:
                break
            if hosts[host] >= OF_A_HOST:
                continue
            hosts[host] += 1
            mine = (WEBHOOKS.c.id == row.id, WEBHOOKS.c.due == row.due)
            with self._jobs.begin() as connection:
                if connection.execute(sql.update(WEBHOOKS).where(*mine).values(due=until)).rowcount:
                    taken.append(Message(row.id, row.url, row.payload.encode(), row.attempts))
        return taken

    def again(self, message: Message, due: float) -> None:
        values = {"attempts": message.attempts + 1, "due": due}
        with self._jobs.begin() as connection:
            connection.execute(sql.update(WEBHOOKS).where(WEBHOOKS.c.id == message.id).values(values))

    def delete(self, message: Message) -> None:
        with self._jobs.begin() as connection:
            connection.execute(sql.delete(WEBHOOKS).where(WEBHOOKS.c.id == message.id))
