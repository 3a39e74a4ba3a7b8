"""A disk that fails: writes and syncs of the database and of pictures return errors, and later work again."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.answerable import within
from support.job_rows import all_ended, sqlite
from support.power_cut import COMPILER, Recording
from support.seeded import GATED, Server
from support.serving import TIMEOUT_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux'"),
    pytest.mark.skipif(not COMPILER and not os.environ.get("CI"), reason="no C compiler; .ci/run installs one"),
]

GENERATIONS = "/v1/images/generations"
ASYNC = {"prefer": "respond-async"}
LOG, PICTURES = "data/jobs.db-wal", "data/generated-images/*"


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    (tmp_path / "home").mkdir()
    return Recording(tmp_path / "home", tmp_path)


@pytest.fixture
def server(tmp_path: Path, recording: Recording) -> Iterator[Server]:
    server = Server(tmp_path / "home")
    server._env |= recording.environment
    with server:
        yield server


def draw(server: Server, headers: dict[str, str] | None = None, **body: str) -> httpx.Response:
    body = {"prompt": "a cat", "response_format": "b64_json"} | body
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        return client.post(GENERATIONS, json=body, headers=headers)


def refuses(server: Server) -> None:
    """New jobs, in clear words; and draws all the same."""
    for headers in (ASYNC, {"idempotency-key": "new"}):
        refused = draw(server, headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "jobs_unavailable"), refused.text
        assert "nothing was accepted" in refused.json()["error"]["message"]
    assert draw(server).status_code == 200


@pytest.mark.parametrize(("op", "error"), [("S", errno.EIO), ("W", errno.EIO), ("W", errno.ENOSPC)])
def test_a_database_that_cannot_be_written_refuses_new_jobs_and_says_of_none_that_it_is_stored(
    tmp_path: Path, recording: Recording, server: Server, op: str, error: int
) -> None:
    answers: list[httpx.Response] = []
    location = draw(server, ASYNC, prompt=f"{GATED} 1").headers["location"]
    keyed = {"idempotency-key": "old"}
    waiting = threading.Thread(target=lambda: answers.append(draw(server, keyed, prompt=f"{GATED} 2")))
    waiting.start()
    within(TIMEOUT_S, lambda: len(server.drawn()) == 2)

    recording.fail(op, LOG, error)
    refuses(server)
    server.open_gate()
    waiting.join()  # it is answered, though its answer cannot be stored
    assert answers[0].status_code == 200
    assert server.client.get(location).json()["status"] in ("queued", "drawing")

    recording.heal()
    within(TIMEOUT_S, lambda: server.client.get(location).json()["status"] == "completed")
    within(TIMEOUT_S, lambda: all_ended(sqlite(tmp_path / "home")))
    assert draw(server, {"idempotency-key": "new"}).status_code == 200
    told, moment = server.client.get(location).json(), recording.moment()
    server.kill()

    # What it now said to be stored is: written again, as what the failed sync left out is lost with the power.
    disk = next(disk for at, _, disk in recording.disks() if at >= moment)
    disk.after_power_cut(tmp_path / "cut")
    with Server(tmp_path / "cut") as again:
        assert again.client.get(location).json() == told
        for key, prompt in ({"idempotency-key": "old"}, f"{GATED} 2"), ({"idempotency-key": "new"}, "a cat"):
            assert draw(again, key, prompt=prompt).headers["idempotency-replayed"] == "true"
        assert not again.drawn()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("op", ["S", "W"])
def test_a_disk_that_fails_at_the_start_refuses_jobs_until_it_works(
    tmp_path: Path, recording: Recording, op: str, error: int
) -> None:
    recording.fail(op, "data/jobs.db*", error)
    server = Server(tmp_path / "home")
    server._env |= recording.environment
    with server:
        refuses(server)
        recording.heal()
        assert draw(server, {"idempotency-key": "new"}).status_code == 200


@pytest.mark.parametrize(("op", "error"), [("S", errno.EIO), ("W", errno.EIO), ("W", errno.ENOSPC)])
def test_a_picture_that_cannot_be_written_is_no_answer(
    tmp_path: Path, recording: Recording, server: Server, op: str, error: int
) -> None:
    recording.fail(op, PICTURES, error)
    keyed = {"idempotency-key": "url"}
    failed = draw(server, keyed, response_format="url")
    assert failed.status_code == 507, failed.text
    assert os.strerror(error) in failed.json()["error"]["message"]
    location = draw(server, ASYNC, response_format="url").headers["location"]
    within(TIMEOUT_S, lambda: server.client.get(location).json()["ended"])
    job = server.client.get(location).json()
    assert (job["status"], job["response"]["status_code"]) == ("failed", 507)
    assert draw(server, {"idempotency-key": "bytes"}).status_code == 200  # the answer has it
    # Without a promise nothing is synced.
    assert draw(server, response_format="url").status_code == (200 if op == "S" else 507)
    left = list((tmp_path / "home/data/generated-images").iterdir())
    assert len(left) == (1 if op == "S" else 0), left

    recording.heal()
    assert draw(server, {"idempotency-key": "next"}, response_format="url").status_code == 200


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_index_that_cannot_be_written_costs_no_picture(recording: Recording, server: Server, error: int) -> None:
    recording.fail("W", "data/gallery.db*", error)  # it is not synced: it can be made again
    keyed = {"idempotency-key": "url"}
    answer = draw(server, keyed, response_format="url", prompt="a lost cat")
    assert answer.status_code == 200, answer.text
    path = httpx.URL(answer.json()["data"][0]["url"]).path
    assert server.client.get(path).headers["content-type"] == "image/png"
    recording.heal()
    assert draw(server, response_format="url").status_code == 200


def test_a_write_that_writes_less_than_it_should_is_continued(recording: Recording, server: Server) -> None:
    for pattern in (LOG, PICTURES):
        recording.fail("W", pattern, 0)
        answer = draw(server, {"idempotency-key": pattern}, response_format="url")
        assert answer.status_code == 200, answer.text
        path = httpx.URL(answer.json()["data"][0]["url"]).path
        recording.heal()
        whole = draw(server, {"idempotency-key": f"{pattern} again"}, response_format="url", prompt="a cat")
        want = httpx.URL(whole.json()["data"][0]["url"]).path
        assert abs(len(server.client.get(path).content) - len(server.client.get(want).content)) < 100
        assert server.client.get(path).headers["content-type"] == "image/png"
