"""Jobs in a real PostgreSQL: kills at every point, two servers, and the death of the database itself."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from sfumato.api.jobs.store import JobStore
from sfumato.api.jobs.tables import Answer, StoredJob
from support import postgresql
from support.answerable import within
from support.job_rows import all_ended, execute, rows
from support.postgresql import PostgreSQL
from support.seeded import GATED, POINTS, Server
from support.serving import TIMEOUT_S

pytestmark = pytest.mark.slow

GENERATIONS = "/v1/images/generations"
KEY = {"idempotency-key": "the key"}
ASYNC = {"prefer": "respond-async"}


@pytest.fixture(scope="module")
def running() -> Iterator[PostgreSQL]:
    with postgresql.running("jobs") as database:
        store = JobStore(database.url, max_age_s=3600, max_bytes=2**30)
        store.expire()  # makes the tables
        store.close()
        yield database


@pytest.fixture
def database(running: PostgreSQL) -> PostgreSQL:
    """Without jobs."""
    execute(running.url, "DELETE FROM jobs")
    return running


def draw(server: Server, headers: dict[str, str], **body: Any) -> httpx.Response:
    body = {"prompt": "a cat", "response_format": "b64_json"} | body
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        return client.post(GENERATIONS, json=body, headers=headers)


@pytest.mark.parametrize("point", POINTS)
def test_whatever_was_accepted_is_answered_once(tmp_path: Path, database: PostgreSQL, point: str) -> None:
    with Server(tmp_path, "--database", database.url, die_at=point) as server:
        with pytest.raises(httpx.TransportError):
            draw(server, KEY)
        assert server.wait() == -9
    assert len(rows(database.url)) == (point != "accepting")
    with Server(tmp_path, "--database", database.url) as server:
        within(TIMEOUT_S, lambda: all_ended(database.url))
        again = draw(server, KEY)
        (job,) = rows(database.url)
        assert (job["state"], job["body"], bytes(job["answer"])) == ("completed", None, again.content)
        assert ("idempotency-replayed" in again.headers) == (point != "accepting")
        assert {seed for _, seed in server.drawn()} == {int(job["secret"][:8], 16)}
        assert server.client.get("/v1/images/gallery").json()["total"] == 1


def test_two_servers_share_it(tmp_path: Path, database: PostgreSQL) -> None:
    one = Server(tmp_path, "--database", database.url, data=tmp_path / "one")
    two = Server(tmp_path, "--database", database.url, data=tmp_path / "two")
    answers: list[httpx.Response] = []
    with one, two:
        threads = [
            threading.Thread(target=lambda server=server: answers.append(draw(server, KEY, prompt=GATED)))
            for server in (one, two) * 4
        ]
        for thread in threads:
            thread.start()
        within(TIMEOUT_S, lambda: len(one.drawn()) == 1)
        one.open_gate()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 8
        assert len({answer.content for answer in answers}) == 1
        assert len(one.drawn()) == 1
        one.close_gate()
        left = draw(one, ASYNC, prompt=GATED).headers["location"]
        within(TIMEOUT_S, lambda: len(one.drawn()) == 2)
        one.kill()
        two.open_gate()
        within(TIMEOUT_S, lambda: all_ended(database.url))
        assert two.client.get(left).json()["status"] == "completed"
        assert one.drawn()[-1] == one.drawn()[1]


def test_the_database_dies_and_comes_back(tmp_path: Path, database: PostgreSQL) -> None:
    answers: list[httpx.Response] = []
    with Server(tmp_path, "--database", database.url) as server:
        waiting = threading.Thread(target=lambda: answers.append(draw(server, KEY, prompt=GATED)))
        waiting.start()
        within(TIMEOUT_S, lambda: len(server.drawn()) == 1)
        database.stop()
        try:
            refused = draw(server, {"idempotency-key": "new"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "jobs_unavailable")
            assert draw(server, {}).status_code == 200
            server.open_gate()
            waiting.join()
            assert answers[0].status_code == 200
        finally:
            database.start()
        within(TIMEOUT_S, lambda: all_ended(database.url))
        again = draw(server, KEY, prompt=GATED)
        assert (again.content, again.headers["idempotency-replayed"]) == (answers[0].content, "true")


def test_many_first_requests_at_once_are_all_accepted(database: PostgreSQL) -> None:
    """Each of them says that its server lives, which nobody has said before."""
    for _ in range(5):
        store = JobStore(database.url, max_age_s=3600, max_bytes=1000)
        at_once = threading.Barrier(4)

        def accept(number: int, store: JobStore = store, at_once: threading.Barrier = at_once) -> StoredJob | None:
            job = StoredJob(
                id=uuid.uuid4().hex, caller="c", fingerprint="f", secret="0" * 32, created=1.0, respond_async=True,
                server=store.server, request={"request_id": str(number)},
            )  # fmt: skip
            at_once.wait()
            return store.accept(job, b"")

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(accept, range(4))) == [None] * 4
        store.close()
    assert len(rows(database.url)) == 20


def test_pages_and_expiry(database: PostgreSQL) -> None:
    store = JobStore(database.url, max_age_s=3600, max_bytes=1000)
    for number in range(4):
        job = StoredJob(
            id=f"job{number}", caller="c", key=f"key {number}", fingerprint="f", secret="0" * 32,
            created=1.0 + number // 2, respond_async=True, server=store.server, request={"request_id": str(number)},
        )  # fmt: skip
        assert store.accept(job, b"\0\xff") is None
        assert store.body(job.id) == b"\0\xff"
        found = store.accept(job, b"")
        assert found is not None
        assert found.id == job.id
    assert store.get("a\0b") is None
    first, more = store.page("c", before=None, limit=3)
    assert ([job.id for job in first], more) == (["job3", "job2", "job1"], True)
    rest, more = store.page("c", before=(first[-1].created, first[-1].id), limit=3)
    assert ([job.id for job in rest], more) == (["job0"], False)
    for number in range(4):
        assert store.end(f"job{number}", "completed", Answer(200, [], b"x" * 300))
    assert store.expire() == 1
    execute(database.url, "UPDATE jobs SET ended = ended - 4000 WHERE id = 'job2'")
    assert store.expire() == 1
    assert [job.id for job in store.page(None, before=None, limit=9)[0]] == ["job3", "job1"]
    store.close()
