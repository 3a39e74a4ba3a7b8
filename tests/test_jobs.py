"""Requests as jobs: answered later, joined by their key, cancelled, listed; against a real server process."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sql

from sfumato.api.jobs.headers import fingerprint, wishes
from sfumato.api.jobs.jobs import _is_stored
from sfumato.api.jobs.run import KEPT, Run
from sfumato.api.jobs.tables import StoredJob
from sfumato.errors import InvalidRequest
from support.answerable import within
from support.inside import DRAW, Inside
from support.job_rows import rows
from support.quick import FOR_EVER
from support.seeded import GATED, Server, colour, colour_of
from support.serving import TIMEOUT_S

GENERATIONS = "/v1/images/generations"
PHOTO = Server.png_data_uri()
ASYNC = {"prefer": "respond-async"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("jobs"), "--max-active", "2", "--max-queue", "4") as server:
        yield server


@pytest.fixture(autouse=True)
def open_gate(server: Server) -> Iterator[None]:
    """A test that failed holds up no other."""
    yield
    server.open_gate()


def later(server: Server, path: str = GENERATIONS, headers: dict[str, str] | None = None, **body: Any) -> str:
    """The location of a job."""
    answer = server.client.post(path, json={"prompt": "a cat"} | body, headers=ASYNC | (headers or {}))
    assert answer.status_code == 202, answer.text
    assert answer.headers["preference-applied"] == "respond-async"
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return answer.headers["location"]


def state(server: Server, location: str, **more: Any) -> dict[str, Any]:
    answer = server.client.get(location, **more)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def ended(server: Server, location: str) -> dict[str, Any]:
    within(TIMEOUT_S, lambda: state(server, location)["ended"] is not None)
    return state(server, location)


def keyed(server: Server, key: str, path: str = GENERATIONS, **body: Any) -> httpx.Response:
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        return client.post(path, json={"prompt": "a cat"} | body, headers={"idempotency-key": key})


DIALECTS: dict[str, dict[str, Any]] = {
    GENERATIONS: {"response_format": "b64_json"},
    "/v1/images/edits": {"image": PHOTO, "response_format": "b64_json"},
    "/v1/images/variations": {"image": PHOTO, "response_format": "b64_json"},
    "/v1/images/inpainting": {"image": PHOTO, "mask": PHOTO, "response_format": "b64_json"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a cat"}]},
    "/sdapi/v1/txt2img": {"width": 64, "height": 64},
    "/sdapi/v1/img2img": {"init_images": [PHOTO]},
    "/api/generate": {"model": "m", "stream": False},
    "/models/m": {},
}
CHANGING = ("created", "id", "created_at", "total_duration", "load_duration", "eval_duration", "prompt_eval_duration")
"""Fields of an answer that are of one request."""


@pytest.mark.parametrize("path", DIALECTS)
def test_the_answer_is_that_of_the_request_without_the_header(server: Server, path: str) -> None:
    body = {"prompt": "a cat", "seed": 5} | DIALECTS[path]
    if path == "/models/m":
        body = {"inputs": "a cat", "parameters": {"seed": 5}}
    plain = server.client.post(path, json=body)
    assert plain.status_code == 200, plain.text
    accepted = server.client.post(path, json=body, headers=ASYNC)
    answer = ended(server, accepted.headers["location"])["response"]
    assert answer["status_code"] == 200
    assert answer["headers"]["content-type"] == plain.headers["content-type"]
    if answer["encoding"] == "base64":
        assert base64.b64decode(answer["body"]) == plain.content
        return
    expected = plain.json()
    assert answer["body"].keys() == expected.keys()
    for name in expected.keys() - set(CHANGING):
        if name != "info":  # of AUTOMATIC1111, with a time in it
            assert answer["body"][name] == expected[name], name


def test_a_job_tells_its_progress_and_its_events(server: Server) -> None:
    server.close_gate()
    location = later(server, prompt=GATED)
    within(TIMEOUT_S, lambda: (state(server, location)["progress"] or {}).get("step") == 1)
    now = state(server, location)
    assert (now["status"], now["ended"], now["response"]) == ("drawing", None, None)
    id = now["id"]
    assert server.client.get(f"/v1/images/progress/{id}").json()["status"] == "drawing"
    seen = []
    with server.client.stream("GET", f"{location}/events") as events:
        for line in events.iter_lines():
            seen.append(line)
            if line.startswith("data:"):
                server.open_gate()
    assert events.headers["content-type"].startswith("text/event-stream")
    ids = [line.removeprefix("id: ") for line in seen if line.startswith("id:")]
    kinds = [line.removeprefix("event: ") for line in seen if line.startswith("event:")]
    assert (ids[0], ids[-1], kinds[-1]) == ("drawing-1-0", "end", "completed")
    assert len(set(ids)) == len(ids)
    resumed = server.client.get(f"{location}/events", headers={"last-event-id": ids[0]})
    assert resumed.text.startswith("id: end\nevent: completed\ndata: {")
    assert server.client.get(f"{location}/events", headers={"last-event-id": "end"}).status_code == 204


def test_a_stream_is_stored_too(server: Server) -> None:
    first = keyed(server, "stream-1", stream=True, seed=9)
    again = keyed(server, "stream-1", stream=True, seed=9)
    assert first.headers["content-type"].startswith("text/event-stream")
    assert "image_generation.completed" in first.text
    assert (again.content, again.headers["idempotency-replayed"]) == (first.content, "true")
    answer = ended(server, later(server, stream=True, seed=9))["response"]
    assert (answer["encoding"], answer["body"].splitlines()[0]) == ("text", "event: image_generation.completed")


def test_a_stream_is_passed_on_while_it_is_drawn_and_joined(server: Server) -> None:
    server.close_gate()
    body = {"prompt": GATED, "messages": [{"role": "user", "content": GATED}], "stream": True}
    texts: list[str] = []

    def read(begun: threading.Event) -> None:
        headers = {"idempotency-key": "joined-stream"}
        client = httpx.Client(base_url=server.url, timeout=TIMEOUT_S)
        with client, client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            text = ""
            for piece in answer.iter_text():
                text += piece
                if ": step 1" in text:
                    begun.set()
            texts.append(text)

    begun = [threading.Event(), threading.Event()]
    threads = [threading.Thread(target=read, args=(each,)) for each in begun]
    before = len(server.drawn())
    for thread, event in zip(threads, begun, strict=True):
        thread.start()
        assert event.wait(TIMEOUT_S)
    server.open_gate()
    for thread in threads:
        thread.join()
    assert texts[0] == texts[1]
    assert texts[0].endswith("data: [DONE]\n\n")
    assert len(server.drawn()) == before + 1


def test_a_key_joins_the_running_job_and_returns_its_answer(server: Server) -> None:
    """Two clients at the same time: one picture, one answer."""
    server.close_gate()
    before = len(server.drawn())
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(keyed, server, "together", prompt=GATED, response_format="b64_json") for _ in range(8)]
        within(TIMEOUT_S, lambda: len(server.drawn()) == before + 1)
        server.open_gate()
        done = [answer.result() for answer in answers]
    assert len(server.drawn()) == before + 1
    assert len({answer.content for answer in done}) == 1
    assert sorted("idempotency-replayed" in answer.headers for answer in done) == [False] + [True] * 7
    later_one = keyed(server, "together", prompt=GATED, response_format="b64_json")
    assert (later_one.content, later_one.headers["idempotency-replayed"]) == (done[0].content, "true")
    _, seed = server.drawn()[-1]
    assert done[0].json()["data"][0]["seed"] == seed
    assert colour_of(done[0].json()["data"][0]["b64_json"]) == colour(seed)


@pytest.mark.parametrize("change", [{"prompt": "a dog"}, {"seed": 2}])
def test_a_key_with_another_request_is_refused(server: Server, change: dict[str, Any]) -> None:
    key = uuid.uuid4().hex
    assert keyed(server, key, seed=1).status_code == 200
    refused = keyed(server, key, **{"seed": 1} | change)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert refused.json()["error"]["param"] == "Idempotency-Key"
    assert keyed(server, key, "/images/generations", seed=1).status_code == 422  # another path
    assert keyed(server, key, seed=1).headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize("key", ["", '""', "x" * 256, "tab\there", '"tab\there"'])
def test_a_malformed_key_is_refused(server: Server, key: str) -> None:
    refused = keyed(server, key)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_a_key_may_be_quoted(server: Server) -> None:
    key = uuid.uuid4().hex
    assert keyed(server, key).status_code == 200
    assert keyed(server, f'"{key}"').headers["idempotency-replayed"] == "true"


def test_the_boundary_of_a_form_is_not_part_of_the_request(server: Server) -> None:
    key = {"idempotency-key": uuid.uuid4().hex}
    file = base64.b64decode(PHOTO.partition(",")[2])
    sent = [
        server.client.post("/v1/images/edits", data={"prompt": "a cat"}, files={"image": file}, headers=key)
        for _ in range(2)
    ]
    assert [answer.status_code for answer in sent] == [200, 200]
    assert sent[0].request.headers["content-type"] != sent[1].request.headers["content-type"]
    assert sent[1].headers["idempotency-replayed"] == "true"
    other = server.client.post("/v1/images/edits", data={"prompt": "a dog"}, files={"image": file}, headers=key)
    assert other.status_code == 422


def test_a_client_that_leaves_finds_its_answer(server: Server) -> None:
    server.close_gate()
    key, before = uuid.uuid4().hex, len(server.drawn())
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=1.0) as client:
        client.post(GENERATIONS, json={"prompt": GATED}, headers={"idempotency-key": key})
    within(TIMEOUT_S, lambda: len(server.drawn()) == before + 1)
    server.open_gate()
    answer = keyed(server, key, prompt=GATED)
    assert (answer.status_code, answer.headers["idempotency-replayed"]) == (200, "true")
    assert len(server.drawn()) == before + 1


def test_a_key_serves_requests_with_and_without_prefer(server: Server) -> None:
    key = {"idempotency-key": uuid.uuid4().hex}
    location = later(server, headers=key)
    assert later(server, headers=key) == location
    answer = keyed(server, key["idempotency-key"])
    assert answer.headers["idempotency-replayed"] == "true"
    assert answer.json() == ended(server, location)["response"]["body"]


def test_a_promise_to_one_who_joins_holds_after_a_crash_and_for_a_503(server: Server) -> None:
    server.close_gate()
    key, before = {"idempotency-key": uuid.uuid4().hex}, len(server.drawn())
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(keyed, server, key["idempotency-key"], prompt=GATED)
        within(TIMEOUT_S, lambda: len(server.drawn()) == before + 1)
        location = later(server, headers=key, prompt=GATED)
        (row,) = [row for row in rows(f"sqlite:///{server.data / 'jobs.db'}") if row["id"] == location[9:]]
        assert row["respond_async"]
        server.open_gate()
        assert first.result().status_code == 200
    job = StoredJob(
        id="j", caller="c", fingerprint="f", secret="0" * 32, created=1.0, respond_async=False, server="s",
        request={"request_id": "j"},
    )  # fmt: skip
    run = Run(job)
    asyncio.run(run.record({"type": "http.response.start", "status": 503, "headers": []}))
    assert not _is_stored(run)
    run.promise()
    assert _is_stored(run)


def test_prefer_wait_answers_at_once_if_it_is_quick(server: Server) -> None:
    body = {"prompt": "a cat"}
    answer = server.client.post(GENERATIONS, json=body, headers={"prefer": "respond-async, wait=60"})
    assert answer.status_code == 200
    assert "data" in answer.json()


def test_it_is_cancelled(server: Server) -> None:
    location = later(server, steps=FOR_EVER)
    cancelled = server.client.delete(location).json()
    assert (cancelled["status"], cancelled["response"]["status_code"]) == ("cancelled", 499)
    assert cancelled["response"]["body"]["error"]["code"] == "cancelled"
    assert server.client.delete(location).json() == cancelled == state(server, location)
    assert server.client.get("/v1/images/progress").json()["data"] == []


def test_a_detached_job_is_cancelled_too(server: Server) -> None:
    location = later(server, steps=FOR_EVER, detached=True)
    assert server.client.delete(location).json()["status"] == "cancelled"
    assert server.client.get("/v1/images/progress").json()["data"] == []


def test_a_request_with_a_key_is_watched_and_cancelled_by_its_own_id(server: Server) -> None:
    ids = {"x-request-id": uuid.uuid4().hex, "idempotency-key": uuid.uuid4().hex}
    body = {"prompt": "a cat", "steps": FOR_EVER}
    progress = f"/v1/images/progress/{ids['x-request-id']}"
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        answer = pool.submit(client.post, GENERATIONS, json=body, headers=ids)
        within(TIMEOUT_S, lambda: server.client.get(progress).json().get("step") == 1)
        assert server.client.delete(progress).json()["status"] == "cancelled"
        assert answer.result().status_code == 499
        again = client.post(GENERATIONS, json=body, headers=ids)
    assert (again.status_code, again.headers["idempotency-replayed"]) == (499, "true")
    metrics = server.client.get("/metrics").text
    assert f'sfumato_http_requests_total{{method="POST",route="{GENERATIONS}",status="499"}}' in metrics


def test_the_deadline_of_a_request_is_kept(server: Server) -> None:
    server.close_gate()
    later(server, prompt=GATED)  # the other place is for another caller
    job = ended(server, later(server, headers={"x-deadline-ms": "1"}))
    assert (job["status"], job["response"]["status_code"]) == ("failed", 504)


def test_every_header_that_drawing_routes_read_is_stored(tmp_path: Path) -> None:
    paths = Inside(tmp_path).app.openapi()["paths"].values()
    drawing = [path["post"] for path in paths if "202" in path.get("post", {}).get("responses", {})]
    assert len(drawing) > 8
    headers = {
        each["name"] for operation in drawing for each in operation.get("parameters", ()) if each["in"] == "header"
    }
    assert headers <= set(KEPT)


def test_errors_that_are_known_at_once_are_answers_and_no_jobs(server: Server) -> None:
    before = server.client.get("/v1/jobs").json()["data"]
    for headers in (ASYNC, {"idempotency-key": "wrong"}):
        answer = server.client.post(GENERATIONS, json={"prompt": "a cat", "n": 0}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
        answer = server.client.post(GENERATIONS, json={"prompt": "a cat", "model": "none"}, headers=headers)
        assert answer.status_code == 404
    assert server.client.get("/v1/jobs").json()["data"] == before
    assert keyed(server, "wrong").status_code == 200  # the key is free


def test_an_error_after_that_is_an_answer(server: Server) -> None:
    """A source picture is looked at when its request stands in the queue."""
    body = {"image": base64.b64encode(b"no picture").decode()}
    job = ended(server, later(server, "/v1/images/edits", **body))
    assert (job["status"], job["response"]["status_code"]) == ("failed", 400)
    assert job["response"]["body"]["error"]["code"] == "invalid_image"
    first, again = (keyed(server, "bad picture", "/v1/images/edits", **body) for _ in range(2))
    assert (first.status_code, again.status_code, again.content) == (400, 400, first.content)
    assert again.headers["idempotency-replayed"] == "true"


def test_a_full_queue_is_no_answer(server: Server) -> None:
    server.close_gate()
    held = [later(server, prompt=GATED) for _ in range(5)]  # the second place is for another caller
    refused = server.client.post(GENERATIONS, json={"prompt": "a cat"}, headers=ASYNC)
    assert (refused.status_code, "location" in refused.headers) == (429, False)
    assert int(refused.headers["retry-after"]) >= 1
    assert keyed(server, "full").status_code == 429
    listed = server.client.get("/v1/jobs", params={"limit": 5}).json()
    assert [f"/v1/jobs/{job['id']}" for job in listed["data"]] == held[::-1]
    server.open_gate()
    assert [ended(server, location)["status"] for location in held] == ["completed"] * 5
    assert keyed(server, "full").status_code == 200


def test_jobs_are_listed_by_pages(server: Server) -> None:
    made = [later(server) for _ in range(5)]
    first = server.client.get("/v1/jobs", params={"limit": 3}).json()
    rest = server.client.get("/v1/jobs", params={"limit": 2, "before": first["next"]}).json()
    assert [f"/v1/jobs/{job['id']}" for job in [*first["data"], *rest["data"]]] == made[::-1]
    assert server.client.get("/v1/jobs", params={"before": "x"}).status_code == 400
    assert server.client.get("/v1/jobs/no-such").json()["error"]["code"] == "job_not_found"


def test_everybody_sees_their_own(tmp_path: Path) -> None:
    with Server(tmp_path, "--api-keys", "alice:alice-key,bob:bob-key") as server:
        alice, bob = ({"authorization": f"Bearer {name}-key"} for name in ("alice", "bob"))
        location = later(server, headers=alice)
        assert server.client.get(location).status_code == 401
        for method, path in (("GET", location), ("DELETE", location), ("GET", f"{location}/events")):
            assert server.client.request(method, path, headers=bob).status_code == 404
        assert server.client.get("/v1/jobs", headers=bob).json()["data"] == []
        assert [job["id"] for job in server.client.get("/v1/jobs", headers=alice).json()["data"]] == [location[9:]]
        key = {"idempotency-key": "1"}  # of each caller
        bodies = {"prompt": "one"}, {"prompt": "two"}
        answers = [
            server.client.post(GENERATIONS, json=body, headers=who | key)
            for body, who in zip(bodies, (alice, bob), strict=True)
        ]
        assert [answer.status_code for answer in answers] == [200, 200]


def test_answers_expire_by_age_and_by_size(tmp_path: Path) -> None:
    """The oldest of the caller that has most; the newest stays."""
    from sfumato.api.jobs.store import JobStore
    from sfumato.api.jobs.tables import Answer, StoredJob

    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}", max_age_s=3600, max_bytes=1000)

    def put(id: str, caller: str, size: int) -> None:
        job = StoredJob(
            id=id, caller=caller, key=f"key {id}", fingerprint="f", secret="0" * 32, created=time.time(),
            respond_async=True, server=store.server, request={"request_id": id},
        )  # fmt: skip
        assert store.accept(job, b"") is None
        assert store.end(id, "completed", Answer(200, [], b"x" * size))

    for number in range(4):
        put(f"many {number}", "busy", 200)
    put("one", "quiet", 190)
    assert store.expire() == 0
    put("large", "busy", 300)
    assert store.expire() == 2
    assert [job.id for job in store.page(None, before=None, limit=10)[0]] == ["large", "one", "many 3", "many 2"]
    with store.engine.begin() as connection:
        connection.execute(sql.text("UPDATE jobs SET ended = ended - 4000 WHERE id = 'one'"))
    put("next", "quiet", 1)
    assert store.expire() == 1
    assert store.get("one") is None
    store.close()


def test_the_file_becomes_smaller_again(tmp_path: Path) -> None:
    from sfumato.api.jobs.store import JobStore
    from sfumato.api.jobs.tables import Answer, StoredJob

    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}", max_age_s=3600, max_bytes=2**20)
    for number in range(20):
        job = StoredJob(
            id=str(number), caller="c", fingerprint="f", secret="0" * 32, created=1.0, respond_async=True,
            server=store.server, request={"request_id": "x"},
        )  # fmt: skip
        assert store.accept(job, b"x" * 2**20) is None
        assert store.end(job.id, "completed", Answer(200, [], b"x" * 2**21))
    assert store.expire() == 19
    store.close()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 3 * 2**20


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["respond-async"], (True, 0)),
        (["Respond-Async"], (True, 0)),
        (["return=minimal, respond-async; x=1, wait=7"], (True, 7)),
        (['foo="a, respond-async", wait=3', "respond-async"], (True, 3)),
        (["respond-async, wait=100000"], (True, 60)),
        (["respond-async, wait=soon"], (True, 0)),
        (["return=representation"], None),
        (['foo="respond-async"'], None),
        ([""], None),
        (["respond-async; wait"], (True, 0)),
        (['respond-async; note="one, two"; x'], (True, 0)),
        (['foo; x="y \\", respond-async, wait=5'], None),  # all within the quotes, which nothing ends
        (['foo; x="y \\" z", respond-async, wait="5"'], (True, 5)),
        ([", respond-async,, wait = 4 ,"], (True, 4)),
        (["@, respond-async"], (True, 0)),
        (["respond-async, wait=" + "9" * 5000], (True, 60)),
        (["respond-async, wait=" + "0" * 20 + "7"], (True, 7)),
        (["respond-async, wait=-7"], (True, 0)),
    ],
)
def test_preferences(values: list[str], expected: tuple[bool, int] | None) -> None:
    found = wishes({"type": "http", "headers": [(b"prefer", value.encode()) for value in values]})
    assert (found and (found.respond_async, found.wait_s)) == expected


def test_a_long_preference_takes_no_longer_than_a_valid_one() -> None:
    """Minutes, if it backtracked."""
    for value in (b"a" * 60_000 + b'"', b'"\\' * 30_000, b'"a",' * 15_000 + b'"'):
        assert wishes({"type": "http", "headers": [(b"prefer", value)]}) is None


@pytest.mark.parametrize(("one", "other"), [(r'"a\"b"', 'a"b'), (r'"a\\b"', r"a\b"), ('"ab"', "ab"), ('"', r'"\""')])
def test_a_key_is_the_same_with_and_without_quotes(one: str, other: str) -> None:
    keys = [wishes({"type": "http", "headers": [(b"idempotency-key", key.encode())]}) for key in (one, other)]
    assert keys[0]
    assert keys[0] == keys[1]


def test_a_short_boundary_hides_no_difference() -> None:
    """The letters of a boundary may stand in a text, too."""

    def of(text: str, boundary: str, kind: str = "multipart/form-data") -> str:
        form = f'--{boundary}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n{text}\r\n--{boundary}--\r\n'
        headers = [(b"content-type", f"{kind}; boundary={boundary}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
        return fingerprint(scope, form.encode())

    assert of("a cat", "a") != of("c cat", "a")
    assert of("a cat", "c") != of("aat", "c")
    assert of("a cat", "a") == of("a cat", "b" * 60)
    assert of("a cat", "a", "application/json") != of(" ct", "a", "application/json")


def test_a_key_that_is_sent_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="2 times"):
        wishes({"type": "http", "headers": [(b"idempotency-key", b"a"), (b"idempotency-key", b"b")]})


def test_a_plain_request_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the database, no thread, no body in memory twice; a request with a key shows what is counted."""
    from sfumato.api.batches.batches import Batches
    from sfumato.api.jobs import middleware
    from sfumato.api.jobs.jobs import Jobs

    calls: list[str] = []

    async def blocking(jobs: Jobs, call: Any, *args: Any, **more: Any) -> Any:
        calls.append("thread")
        return call(*args, **more)

    async def body(receive: Any) -> Any:
        calls.append("body")
        return await read(receive)

    read = middleware._body
    monkeypatch.setattr(Jobs, "start", lambda jobs: None)  # it looks for jobs of other servers
    monkeypatch.setattr(Batches, "start", lambda batches: None)  # as well
    monkeypatch.setattr(Jobs, "blocking", blocking)
    monkeypatch.setattr(middleware, "_body", body)
    inside = Inside(tmp_path)
    sql.event.listen(inside.app.state.jobs.store.engine, "connect", lambda *_: calls.append("database"))
    with inside.client() as client:
        assert client.post(GENERATIONS, **DRAW).status_code == 200
        assert client.post(GENERATIONS, **DRAW, headers={"prefer": "return=minimal"}).status_code == 200
        assert calls == []
        assert not (tmp_path / "data" / "jobs.db").exists()
        assert client.post(GENERATIONS, **DRAW, headers={"idempotency-key": "x"}).status_code == 200
        assert calls[:3] == ["body", "thread", "database"]


def test_what_is_stored_has_no_secrets(server: Server) -> None:
    key = {"idempotency-key": "secret-key", "authorization": "Bearer secret", "cookie": "secret=1"}
    location = later(server, headers=key)
    with sql.create_engine(f"sqlite:///{server.data / 'jobs.db'}").connect() as connection:
        row = connection.execute(sql.text("SELECT * FROM jobs WHERE id = :id"), {"id": location[9:]}).mappings().one()
    assert "secret" not in json.dumps({name: str(value) for name, value in row.items() if name != "secret"})
