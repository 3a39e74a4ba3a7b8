"""The server dies (kill -9) at every point of a job's life, and is started again: answered once, same pixels."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.answerable import within
from support.job_rows import all_ended, execute, rows, sqlite
from support.quick import FOR_EVER
from support.seeded import GATED, POINTS, Server, colour, colour_of
from support.serving import TIMEOUT_S

GENERATIONS = "/v1/images/generations"
BODY = {"prompt": "a cat", "n": 2, "response_format": "b64_json"}
KEY = {"idempotency-key": "the key"}
KINDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "asynchronous": (BODY, KEY | {"prefer": "respond-async"}),
    "keyed": (BODY, KEY),
    "streamed": ({"prompt": "a cat", "stream": True}, KEY),
}


def send(server: Server, kind: str) -> httpx.Response:
    body, headers = KINDS[kind]
    return server.client.post(GENERATIONS, json=body, headers=headers)


@contextmanager
def dying(folder: Path, point: str) -> Iterator[Server]:
    """A server that dies there; the block ends once it has."""
    with Server(folder, die_at=point) as server:
        yield server
        assert server.wait() == -9


@pytest.mark.parametrize(
    "kind", [each if each == "keyed" else pytest.param(each, marks=pytest.mark.slow) for each in KINDS]
)
@pytest.mark.parametrize("point", POINTS)
def test_whatever_was_accepted_is_answered_once(tmp_path: Path, point: str, kind: str) -> None:
    with dying(tmp_path, point) as server:
        try:
            answer = send(server, kind)
            assert (kind, answer.status_code) in (("asynchronous", 202), ("streamed", 200))
        except httpx.TransportError:
            pass
    kept = rows(sqlite(tmp_path))
    assert len(kept) == (point != "accepting")
    with Server(tmp_path) as server:
        within(TIMEOUT_S, lambda: all_ended(sqlite(tmp_path)))  # nobody has to ask
        again = send(server, kind)
        if kind == "asynchronous":
            assert again.status_code == 202
            within(TIMEOUT_S, lambda: all_ended(sqlite(tmp_path)))
        (job,) = rows(sqlite(tmp_path))
        assert (job["state"], job["body"]) == ("completed", None)
        if kind != "asynchronous":
            assert again.content == job["answer"]
        assert ("idempotency-replayed" in again.headers) == (point != "accepting")
        if kept:
            assert (job["id"], job["secret"]) == (kept[0]["id"], kept[0]["secret"])
        # Every life that drew it drew the same, and it is stored once.
        first = int(job["secret"][:8], 16)
        count = BODY["n"] if kind != "streamed" else 1
        assert {seed for _, seed in server.drawn()} == {first + index for index in range(count)}
        if kind != "streamed":
            body = server.client.get(f"/v1/jobs/{job['id']}").json()["response"]["body"]
            assert body["created"] == int(job["created"])
            pictures = body["data"]
            assert [each["seed"] for each in pictures] == [first, first + 1]
            assert [colour_of(each["b64_json"]) for each in pictures] == [colour(first), colour(first + 1)]
        listed = server.client.get("/v1/images/gallery").json()
        files = list((tmp_path / "data" / "generated-images").iterdir())
        assert (listed["total"], len(files)) == (count, count)


def test_what_waits_in_the_queue_is_drawn_in_its_order(tmp_path: Path) -> None:
    sent = [f"{GATED} {number}" for number in range(6)]
    headers = {"prefer": "respond-async"}
    with Server(tmp_path, "--max-active", "2") as server:
        for prompt in sent:
            assert server.client.post(GENERATIONS, json={"prompt": prompt}, headers=headers).status_code == 202
        cancelled = server.client.post(GENERATIONS, json={"prompt": "x"}, headers=headers).headers["location"]
        server.client.delete(cancelled)
        server.kill()
    began = [prompt for prompt, _ in server.drawn()]
    server.open_gate()
    with Server(tmp_path, "--max-active", "1") as server:
        within(TIMEOUT_S, lambda: all_ended(sqlite(tmp_path)))
        assert [prompt for prompt, _ in server.drawn()][len(began) :] == sent
        assert server.client.get(cancelled).json()["status"] == "cancelled"
        seeds: dict[str, set[int]] = {}
        for prompt, seed in server.drawn():
            seeds.setdefault(prompt, set()).add(seed)
        assert {len(each) for each in seeds.values()} == {1}


def test_more_than_the_queue_takes_is_drawn_as_well(tmp_path: Path) -> None:
    """The limits are lower after the restart: what was promised waits, and is not refused."""
    headers = {"prefer": "respond-async"}
    with Server(tmp_path) as server:
        for number in range(6):
            body = {"prompt": f"{GATED} {number}"}
            assert server.client.post(GENERATIONS, json=body, headers=headers).status_code == 202
        server.kill()
    with Server(tmp_path, "--max-active", "1", "--max-queue", "1") as server:

        def full() -> bool:
            with suppress(httpx.ReadTimeout):  # it stood in the queue before what was promised
                return "the limit is 1" in server.client.post(GENERATIONS, json={"prompt": "x"}, timeout=2).text
            return False

        within(TIMEOUT_S, full)
        server.open_gate()
        within(TIMEOUT_S, lambda: all_ended(sqlite(tmp_path)))
        assert [row["state"] for row in rows(sqlite(tmp_path))] == ["completed"] * 6


def test_a_graceful_stop_leaves_jobs_to_the_next_start(tmp_path: Path) -> None:
    headers = {"prefer": "respond-async"}
    with Server(tmp_path) as server:
        body = {"prompt": GATED}
        assert server.client.post(GENERATIONS, json=body, headers=headers).status_code == 202
        within(TIMEOUT_S, lambda: len(server.drawn()) == 1)
        assert server.stop() == 0
    assert [row["state"] for row in rows(sqlite(tmp_path))] == ["open"]
    server.open_gate()
    with Server(tmp_path):
        within(TIMEOUT_S, lambda: all_ended(sqlite(tmp_path)))
    assert [row["state"] for row in rows(sqlite(tmp_path))] == ["completed"]


def test_a_cancelled_job_that_its_server_did_not_end_is_not_drawn(tmp_path: Path) -> None:
    headers = {"prefer": "respond-async"}
    with Server(tmp_path) as server:
        body = {"prompt": "a cat", "steps": FOR_EVER}
        assert server.client.post(GENERATIONS, json=body, headers=headers).status_code == 202
        within(TIMEOUT_S, lambda: len(server.drawn()) == 1)
        server.kill()
    execute(sqlite(tmp_path), "UPDATE jobs SET cancelled = 1")  # as DELETE does first
    with Server(tmp_path) as server:
        within(TIMEOUT_S, lambda: all_ended(sqlite(tmp_path)))
        assert len(server.drawn()) == 1
    assert [(row["state"], row["status"]) for row in rows(sqlite(tmp_path))] == [("cancelled", 499)]


def test_a_job_that_kills_its_server_each_time_is_given_up(tmp_path: Path) -> None:
    headers = {"prefer": "respond-async"}
    with Server(tmp_path) as server:
        assert server.client.post("/api/generate", json={"prompt": GATED}, headers=headers).status_code == 202
        server.kill()
    execute(sqlite(tmp_path), "UPDATE jobs SET lives = 20")
    with Server(tmp_path) as server:
        within(TIMEOUT_S, lambda: all_ended(sqlite(tmp_path)))
        (job,) = server.client.get("/v1/jobs").json()["data"]
        answer = server.client.get(f"/v1/jobs/{job['id']}").json()["response"]
    assert (job["status"], answer["status_code"]) == ("failed", 500)
    assert answer["body"] == {"error": "the server died 20 times before this request was answered"}


def test_events_end_when_the_server_stops(tmp_path: Path) -> None:
    headers = {"prefer": "respond-async"}
    with Server(tmp_path, "--grace-s", "3600") as server:
        location = server.client.post(GENERATIONS, json={"prompt": GATED}, headers=headers).headers["location"]
        with server.client.stream("GET", f"{location}/events") as events:
            for line in events.iter_lines():
                if line == "id: drawing-1-0":
                    server.signal(signal.SIGTERM)
        assert server.wait() == 0  # and does not wait for the picture


def test_events_go_on_after_a_restart(tmp_path: Path) -> None:
    headers = {"prefer": "respond-async"}
    with Server(tmp_path) as server:
        location = server.client.post(GENERATIONS, json={"prompt": GATED}, headers=headers).headers["location"]
        last = ""
        with pytest.raises(httpx.TransportError), server.client.stream("GET", f"{location}/events") as events:
            for line in events.iter_lines():
                if line.startswith("id:"):
                    last = line.removeprefix("id: ")
                if last == "drawing-1-0":
                    server.kill()
    server.open_gate()
    with Server(tmp_path) as server:
        text = server.client.get(f"{location}/events", headers={"last-event-id": last}).text
        assert f"id: {last}\n" not in text
        assert text.count("event: completed") == 1


def test_a_model_that_its_caller_had_selected_is_used_again(tmp_path: Path) -> None:
    """AUTOMATIC1111's clients select a model, which the server forgets when it dies."""
    headers = {"prefer": "respond-async"}
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.yaml").write_text("name: a\nparameters:\n  model: some/other\n")
    with Server(tmp_path, "--default-model", "a") as server:
        server.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "m"})
        body = {"prompt": GATED}
        location = server.client.post("/sdapi/v1/txt2img", json=body, headers=headers).headers["location"]
        within(TIMEOUT_S, lambda: len(server.drawn()) == 1)
        server.kill()
    server.open_gate()
    with Server(tmp_path, "--default-model", "a") as server:
        within(TIMEOUT_S, lambda: all_ended(sqlite(tmp_path)))
        info = server.client.get(location).json()["response"]["body"]["info"]
        assert '"sd_model_name": "m"' in info


def test_a_row_is_of_use_only_while_it_is_young(tmp_path: Path) -> None:
    """A key whose answer has expired draws anew, also before the row is deleted."""
    with Server(tmp_path, "--jobs-max-age-h", "1") as server:
        assert "idempotency-replayed" not in send(server, "keyed").headers
        assert "idempotency-replayed" in send(server, "keyed").headers
        execute(sqlite(tmp_path), "UPDATE jobs SET ended = :ended", ended=time.time() - 3700)
        assert "idempotency-replayed" not in send(server, "keyed").headers
        assert len(rows(sqlite(tmp_path))) == 1
