"""Files, batches and webhooks in a real PostgreSQL."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql

from sfumato.api.batches.files import FileStore
from sfumato.api.batches.tables import StoredFile
from sfumato.api.jobs.store import JobStore
from sfumato.errors import RequestTooLarge
from support import postgresql
from support.answerable import within
from support.batching_client import begun, counts, ended, jsonl, lines_of, sdk, uploaded
from support.postgresql import PostgreSQL
from support.quick import FOR_EVER
from support.receiver import SECRET, Receiver
from support.seeded import GATED, Server, colour, colour_of
from support.serving import TIMEOUT_S

pytestmark = pytest.mark.slow

CAT = {"prompt": "a cat", "response_format": "b64_json"}


@pytest.fixture(scope="module")
def database() -> Iterator[PostgreSQL]:
    with postgresql.running("batches") as database:
        yield database


def test_a_batch_goes_on_after_a_kill(tmp_path: Path, database: PostgreSQL) -> None:
    flags = ("--database", database.url, "--webhook-hosts", "localhost", "--webhook-secret", SECRET)
    bodies = [CAT] * 4 + [CAT | {"n": 0}] + [CAT | {"prompt": GATED}] * 4
    with Receiver().running() as receiver:
        with Server(tmp_path, *flags) as server, sdk(server) as client:
            id = begun(client, jsonl(bodies), extra_headers={"x-webhook-url": receiver.url}).id
            within(TIMEOUT_S, lambda: counts(client.batches.retrieve(id)) == {"total": 9, "completed": 4, "failed": 1})
            server.kill()
        server.open_gate()
        with Server(tmp_path, *flags) as server, sdk(server) as client:
            done = ended(client, id)
            assert (done.status, counts(done)) == ("completed", {"total": 9, "completed": 8, "failed": 1})
            for line in lines_of(client, done.output_file_id):
                (item,) = line["response"]["body"]["data"]
                assert colour_of(item["b64_json"]) == colour(item["seed"])
            assert server.client.get("/v1/images/gallery").json()["total"] == 8
            within(TIMEOUT_S, lambda: len(receiver.messages) == 1)
            assert receiver.event()["type"] == "batch.completed"


def test_limits_are_kept_when_many_write_at_once(database: PostgreSQL) -> None:
    """Of one caller; another one does not wait. Each first looks, and all have looked before the first one writes."""
    with ThreadPoolExecutor() as pool:
        stores = [FileStore(JobStore(database.url, max_age_s=3600, max_bytes=2**20), max_bytes=1000) for _ in range(8)]
        stores[0].page("nobody", purpose=None, after=None, limit=1, newest_first=True)  # makes the tables

        def add(store: FileStore, caller: str) -> bool:
            file = StoredFile(
                id=f"file-{uuid.uuid4().hex}", caller=caller, purpose="batch", filename="a", created=1.0, expires=9e9,
                bytes=300,
            )  # fmt: skip
            try:
                store.add(file, bytes(300))
            except RequestTooLarge:
                return False
            return True

        looking = threading.Barrier(8)
        for store in stores:
            sql.event.listen(store._jobs.engine, "after_cursor_execute", partial(_all_at_once, looking))
        added = list(pool.map(add, stores, ["one"] * 8))
        assert sum(added) == 3
        with stores[0]._jobs.begin(alone="one"):
            assert pool.submit(add, stores[1], "two").result(TIMEOUT_S)
    for store in stores:
        store._jobs.close()


def _all_at_once(looking: threading.Barrier, _: Any, __: Any, statement: str, *more: Any) -> None:
    """What nobody else keeps out looks at the room together with all others."""
    if "sum(lines.bytes)" in statement:
        with suppress(threading.BrokenBarrierError):
            looking.wait(0.5)


def test_files_and_cancellation(tmp_path: Path, database: PostgreSQL) -> None:
    with Server(tmp_path, "--database", database.url) as server, sdk(server) as client:
        files = [uploaded(client, jsonl([CAT])) for _ in range(3)]
        assert [file.id for file in client.files.list(limit=2, purpose="batch")][:3] == files[::-1]
        assert client.files.content(files[0]).content == jsonl([CAT])
        batch = begun(client, jsonl([CAT | {"steps": FOR_EVER}] * 20))
        client.batches.cancel(batch.id)
        done = ended(client, batch.id)
        assert (done.status, counts(done)["failed"]) == ("cancelled", 20)
        assert len(lines_of(client, done.error_file_id)) == 20
        assert client.files.delete(str(done.error_file_id)).deleted
