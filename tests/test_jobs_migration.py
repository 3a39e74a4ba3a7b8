"""A database that an earlier version wrote: `data/jobs-before-route.sql` is one, as it stood in SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sfumato.api.jobs.store import JobStore
from sfumato.api.jobs.tables import StoredJob
from support import postgresql
from support.inside import Inside
from support.job_rows import execute, rows

OLD = (Path(__file__).parent / "data" / "jobs-before-route.sql").read_text()
CLIPS = ["3547a7403e344bbfa8d71b72fd722673", "0d3115331ac74f10a3a6b2aba536ae43"]
"""Newest first. The third job is a picture whose prompt has the path of clips in it."""
PICTURE = "0eddb7075e5640b3a121d38c31a5e0d9"
FOR_EVER_S = 1e12
FIELDS = {"fingerprint": "f", "secret": "0" * 32, "respond_async": True, "server": ""}


def store_of(url: str) -> JobStore:
    return JobStore(url, max_age_s=FOR_EVER_S, max_bytes=2**30)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a database with the old tables and rows."""
    if request.param == "sqlite":
        with sqlite3.connect(tmp_path / "jobs.db") as connection:
            connection.executescript(OLD)
        connection.close()
        yield f"sqlite:///{tmp_path / 'jobs.db'}"
        return
    types = {"DOUBLE": "DOUBLE PRECISION", "BLOB": "BYTEA", ",1,0,'machine": ",true,false,'machine", ",X'": r",'\x"}
    text = OLD
    for before, after in types.items():
        text = text.replace(before, after)
    with postgresql.running("migration") as database:
        for statement in text.split(";\n"):
            if statement.strip():
                execute(database.url, statement.replace(":", r"\:"))
        yield database.url


def listed(store: JobStore) -> list[str]:
    return [job.id for job in store.page(None, before=None, limit=10, route="/videos")[0]]


def test_it_is_read_and_written_as_a_new_one(url: str) -> None:
    before = rows(url)
    store = store_of(url)
    assert listed(store) == CLIPS
    assert [row | {"route": ""} for row in before] == [row | {"route": ""} for row in rows(url)]
    assert {row["id"] for row in rows(url) if row["route"]} == set(CLIPS)  # others are as large as their pictures
    assert (answer := store.answer(PICTURE)) and answer.status == 200
    new = StoredJob(id="new", caller="c", created=2e9, request={"path": "/x/v1/videos", "root_path": "/x"}, **FIELDS)
    assert store.accept(new, b"{}") is None
    assert listed(store) == ["new", *CLIPS]
    assert store.body("new") == b"{}"
    store.close()
    again = store_of(url)
    assert listed(again) == ["new", *CLIPS]
    again.close()


def test_servers_that_start_at_the_same_time_migrate_it_once(url: str) -> None:
    stores = [store_of(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(listed, stores)) == [CLIPS] * 4
    for store in stores:
        store.close()


def test_a_server_of_the_earlier_version_goes_on_beside(url: str, tmp_path: Path) -> None:
    store = store_of(url)
    assert listed(store) == CLIPS
    names = OLD.partition("CREATE TABLE jobs (\n")[2].partition("PRIMARY KEY")[0].splitlines()
    columns = ", ".join(line.split()[0] for line in names if line.strip())
    execute(url, f"INSERT INTO jobs ({columns}) SELECT {columns.replace('id,', chr(39) + 'old' + chr(39) + ',', 1)} "
                 f"FROM jobs WHERE id = '{CLIPS[0]}'")  # fmt: skip
    assert listed(store) == CLIPS  # the gap that `migration` tells of
    store.close()
    with Inside(tmp_path, database=url).client() as client:
        assert client.get("/v1/videos/old").json()["status"] == "completed"
        assert client.get(f"/v1/videos/{PICTURE}").status_code == 404
