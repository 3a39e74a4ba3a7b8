"""What was promised survives a power cut: a server is started on a disk that lost whatever was not synced."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from support.answerable import within
from support.batching_client import GENERATIONS, begun, counts, ended, jsonl, sdk
from support.job_rows import all_ended, rows, sqlite
from support.power_cut import COMPILER, Recording
from support.seeded import GATED, Server, colour, colour_of
from support.serving import TIMEOUT_S

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux'"),
    pytest.mark.skipif(not COMPILER and not os.environ.get("CI"), reason="no C compiler; .ci/run installs one"),
]

ASYNC = {"prefer": "respond-async"}
TRIES = 2
"""Disks with some of what was not synced, after each moment."""


def ask(server: Server, prompt: str, headers: dict[str, str], **more: str) -> httpx.Response:
    body = {"prompt": prompt, "response_format": "b64_json"} | more
    answer = server.client.post(GENERATIONS, json=body, headers=headers)
    assert answer.status_code in (200, 202), answer.text
    return answer


def promised_of(server: Server, recording: Recording) -> dict[str, int]:
    """Id of a job or a batch → the moment after it was promised. Some are drawn, and some wait at the gate."""
    promised = {}
    for index in range(4):
        for prompt in (f"cat {index}", f"{GATED} {index}"):
            location = ask(server, prompt, ASYNC | {"idempotency-key": prompt}).headers["location"]
            promised[location.rpartition("/")[2]] = recording.moment()
        ask(server, f"dog {index}", {"idempotency-key": f"dog {index}"})
    with sdk(server) as client:
        lines = [{"prompt": f"{GATED} line {index}", "response_format": "b64_json"} for index in range(3)]
        id = begun(client, jsonl(lines)).id
        promised[id] = recording.moment()
    return promised


def stored(file: Path) -> set[str]:
    """Ids of jobs and batches. Fails for a damaged database."""
    database = sqlite3.connect(file)
    try:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {id for (id,) in database.execute("SELECT id FROM jobs UNION SELECT id FROM batches")}
    finally:
        database.close()


@pytest.mark.slow
def test_what_was_promised_is_there_after_a_power_cut_at_any_moment(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    server, recording = Server(home), Recording(home, tmp_path)
    server._env |= recording.environment
    with server:
        promised = promised_of(server, recording)
        server.kill()
    cut, first = tmp_path / "cut", min(promised.values())
    for moment, record, disk in recording.disks():
        if moment < first or not record.name.startswith("data/jobs.db"):
            continue
        lost = [random.Random(moment + each) for each in range(TRIES)]
        for dice in [None] if record.op == "S" else lost:  # nothing becomes certain in between
            disk.after_power_cut(cut, dice)
            assert stored(cut / "data" / "jobs.db") >= {id for id, at in promised.items() if at <= moment}
            shutil.rmtree(cut)
    # A server is started on what is left after the last moment.
    disk.after_power_cut(cut)
    with Server(cut) as again, sdk(again) as client:
        again.open_gate()
        (batch,) = [id for id in promised if id.startswith("batch")]
        assert counts(ended(client, batch))["completed"] == 3
        within(TIMEOUT_S, lambda: all_ended(sqlite(cut)))
        for id in promised.keys() - {batch}:
            (item,) = again.client.get(f"/v1/jobs/{id}").json()["response"]["body"]["data"]
            assert colour_of(item["b64_json"]) == colour(item["seed"])
        seeds = {(row["id"], row["secret"]) for row in rows(sqlite(home))}
        assert seeds == {(row["id"], row["secret"]) for row in rows(sqlite(cut))}


@pytest.mark.slow
def test_the_picture_of_a_stored_answer_is_there_after_a_power_cut(tmp_path: Path) -> None:
    """An answer has the picture's URL, so the picture is synced before the answer is."""
    home = tmp_path / "home"
    home.mkdir()
    server, recording = Server(home), Recording(home, tmp_path)
    server._env |= recording.environment
    with server:
        answer = ask(server, "a cat", {"idempotency-key": "cat"}, response_format="url")
        (item,) = answer.json()["data"]
        answered = recording.moment()
        server.kill()
    disk = next(disk for moment, _, disk in recording.disks() if moment >= answered)
    disk.after_power_cut(tmp_path / "cut")
    with Server(tmp_path / "cut") as again:
        replayed = ask(again, "a cat", {"idempotency-key": "cat"}, response_format="url")
        assert replayed.headers["idempotency-replayed"] == "true"
        path = httpx.URL(replayed.json()["data"][0]["url"]).path
        assert path == httpx.URL(item["url"]).path
        assert again.client.get(path).headers["content-type"] == "image/png"


@pytest.mark.parametrize(("synchronous", "survives"), [("FULL", True), ("NORMAL", False)])
def test_the_recording_tells_what_was_synced(tmp_path: Path, synchronous: str, survives: bool) -> None:
    home = tmp_path / "home"
    home.mkdir()
    recording = Recording(home, tmp_path)
    program = f"""
import os, sqlite3
database = sqlite3.connect({str(home / "a.db")!r})
database.execute("PRAGMA journal_mode=WAL")
database.execute("PRAGMA synchronous={synchronous}")
database.execute("CREATE TABLE items (id)")
database.commit()
database.execute("INSERT INTO items VALUES (1)")
database.commit()
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", program], env=recording.environment, check=False)
    *_, (_, _, disk) = recording.disks()
    disk.after_power_cut(tmp_path / "cut")
    database = sqlite3.connect(tmp_path / "cut" / "a.db")
    try:
        found = database.execute("SELECT * FROM items").fetchall()
    except sqlite3.OperationalError:  # not even the table
        found = []
    finally:
        database.close()
    assert bool(found) == survives
