"""Files, batches and webhooks in a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
