"""Jobs when their database is full, read-only, locked or damaged; and several servers on one database."""

from __future__ import annotations

import resource
import sqlite3
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from sfumato.api.jobs.store import JobStore
from support.answerable import answerable, within
from support.job_rows import all_ended, rows, sqlite
from support.quick import FOR_EVER
from support.seeded import GATED, Server
from support.serving import TIMEOUT_S

GENERATIONS = "/v1/images/generations"
ASYNC = {"prefer": "respond-async"}


def draw(server: Server, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    body = {"prompt": "a cat", "response_format": "b64_json"} | body
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        return client.post(GENERATIONS, json=body, headers=headers)


def refuses(server: Server) -> None:
    """New jobs, in clear words; and draws all the same."""
    for headers in (ASYNC, {"idempotency-key": "new"}, ASYNC | {"idempotency-key": "new"}):
        refused = draw(server, headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "jobs_unavailable"), refused.text
        assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("10", "true")
        message = refused.json()["error"]["message"]
        assert "setting database" in message
        assert "cannot be used: nothing was accepted" in message  # the cause is for the operator
    assert draw(server).status_code == 200


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux lets us limit another process")
def test_a_full_disk_refuses_new_jobs_and_ends_the_others(tmp_path: Path) -> None:
    answers: list[httpx.Response] = []
    with Server(tmp_path) as server:
        location = draw(server, ASYNC, prompt=f"{GATED} 1").headers["location"]
        keyed = {"idempotency-key": "old"}
        waiting = threading.Thread(target=lambda: answers.append(draw(server, keyed, prompt=f"{GATED} 2")))
        waiting.start()
        within(TIMEOUT_S, lambda: len(server.drawn()) == 2)
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (4096, hard))  # no file may become larger
        refuses(server)
        server.open_gate()
        waiting.join()  # it is answered, though its answer cannot be stored
        assert answers[0].status_code == 200
        assert server.client.get(location).json()["status"] in ("queued", "drawing")
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        within(TIMEOUT_S, lambda: all_ended(sqlite(tmp_path)))
        assert server.client.get(location).json()["status"] == "completed"
        again = draw(server, keyed, prompt=f"{GATED} 2")
        assert (again.content, again.headers["idempotency-replayed"]) == (answers[0].content, "true")
        assert sorted(prompt for prompt, _ in server.drawn() if prompt.startswith(GATED)) == [
            f"{GATED} 1",
            f"{GATED} 2",
        ]
        assert draw(server, {"idempotency-key": "new"}).status_code == 200


def test_a_read_only_database_refuses_new_jobs_and_tells_of_the_old(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        location = draw(server, ASYNC, prompt=GATED).headers["location"]
        within(TIMEOUT_S, lambda: len(server.drawn()) == 1)
        server.kill()
    server.open_gate()
    file = tmp_path / "data" / "jobs.db"
    with Server(tmp_path, "--database", f"sqlite:///file:{file}?mode=ro&uri=true") as server:
        refuses(server)
        assert "cannot be used: attempt to write a readonly database" in server.log
        assert server.client.get(location).json()["status"] == "queued"
        assert server.client.delete(location).status_code == 503
    with Server(tmp_path) as server:
        within(TIMEOUT_S, lambda: all_ended(sqlite(tmp_path)))
        assert server.client.get(location).json()["status"] == "completed"


def test_a_locked_database_refuses_new_jobs_after_a_while_and_holds_up_nobody(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        assert draw(server, {"idempotency-key": "first"}).status_code == 200
        with sqlite3.connect(tmp_path / "data" / "jobs.db", isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            with answerable(server.url, server.pid):
                refuses(server)
            other.execute("ROLLBACK")
        assert draw(server, {"idempotency-key": "new"}).status_code == 200


def test_a_damaged_database_keeps_nothing_but_jobs_from_working(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "jobs.db").write_bytes(b"no database " * 1000)
    with Server(tmp_path) as server:
        refuses(server)
        assert server.client.get("/v1/jobs").status_code == 503


WRONG_NUMBERS = ("postgresql+psycopg://u:p@ss:secret@host/d", "sqlite:///x?timeout=soon", "sqlite:///x?uri=maybe")


@pytest.mark.parametrize(
    "url", ["nonsense", "nosuch://x", "postgresql+nosuch://x", "mysql+pymysql://x", "sqlite://", *WRONG_NUMBERS]
)
def test_a_wrong_url_names_the_setting(url: str) -> None:
    with pytest.raises(ValueError, match="database: ") as raised:
        JobStore(url, max_age_s=1, max_bytes=1)
    assert "secret" not in str(raised.value)


def test_several_servers_share_a_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    one = Server(tmp_path, "--database", url, data=tmp_path / "one")
    two = Server(tmp_path, "--database", url, data=tmp_path / "two")
    key = {"idempotency-key": "shared"}
    answers: list[httpx.Response] = []
    with one, two:
        first = threading.Thread(target=lambda: answers.append(draw(one, key, prompt=GATED)))
        first.start()
        within(TIMEOUT_S, lambda: len(one.drawn()) == 1)
        # The other one joins it, shows it, and cancels what the first carries out.
        joined = threading.Thread(target=lambda: answers.append(draw(two, key, prompt=GATED)))
        joined.start()
        (job,) = two.client.get("/v1/jobs").json()["data"]
        assert (job["status"], job["progress"]) == ("queued", None)
        one.open_gate()
        first.join()
        joined.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].content == answers[1].content
        assert len(one.drawn()) == 1
        assert draw(two, key, prompt="another").status_code == 422
        endless = draw(one, ASYNC, steps=FOR_EVER).headers["location"]
        two.client.delete(endless)
        within(TIMEOUT_S, lambda: all_ended(url))
        assert two.client.get(endless).json()["status"] == "cancelled"

        # One dies, and the other carries out what it has accepted.
        one.close_gate()
        left = draw(one, ASYNC, prompt=GATED).headers["location"]
        within(TIMEOUT_S, lambda: one.drawn()[-1][0] == GATED)
        one.kill()
        within(TIMEOUT_S, lambda: len(one.drawn()) == 4)
        two.open_gate()
        within(TIMEOUT_S, lambda: all_ended(url))
        assert two.client.get(left).json()["status"] == "completed"
        assert one.drawn()[-1] == one.drawn()[-2]
        assert len(rows(url)) == 3


def test_a_server_that_was_taken_for_dead_stores_nothing(tmp_path: Path) -> None:
    """It has been stopped for a while; meanwhile another one took its job. Only one of them can store the answer."""
    from sfumato.api.jobs.tables import Answer, StoredJob

    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    one, two = (JobStore(url, max_age_s=3600, max_bytes=2**20) for _ in range(2))
    job = StoredJob(
        id="j", caller="c", fingerprint="f", secret="0" * 32, created=1.0, respond_async=True, server=one.server,
        request={"request_id": "j"},
    )  # fmt: skip
    assert one.accept(job, b"body") is None
    assert two.claim(()) == []  # it lives
    with one.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE servers SET seen = seen - 31")
    assert [each.id for each in two.claim(())] == ["j"]
    assert two.claim(("j",)) == []
    assert (one.body("j"), two.body("j")) == (None, b"body")
    one.beat()  # it goes on
    assert one.claim(()) == []
    assert not one.end("j", "completed", Answer(200, [], b"one"))
    assert two.end("j", "completed", Answer(200, [("a", "b")], b"two"))
    assert not two.end("j", "failed", Answer(500, [], b"again"))
    assert one.answer("j") == Answer(200, [("a", "b")], b"two")
    one.close()
    two.close()
