"""What was promised waits for a worker that does not start."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from sfumato.api.jobs import jobs
from sfumato.core import Event, Failed, Preview
from sfumato.errors import DownloadError, JobsUnavailable, NoWorker, SfumatoError, WorkerDied
from support.answerable import within
from support.batching_client import GENERATIONS, jsonl
from support.inside import Inside
from support.pictures import encoded
from support.serving import TIMEOUT_S

ASYNC = {"prefer": "respond-async"}
CAT = {"prompt": "a cat", "response_format": "b64_json"}


class Broken:
    """`errors`: how often what is drawn fails, and with which one. `seeds`: of all tries."""

    def __init__(self, inside: Inside, errors: list[Exception]) -> None:
        self.errors = errors
        self.seeds: list[int] = []
        draw = inside.engine.submit

        async def submit(config: Any, generation: Any) -> AsyncGenerator[Event, None]:
            self.seeds.append(generation.seed)
            if self.errors:
                if generation.previews:
                    yield Preview(0, 1, 2, encoded(Image.new("RGB", (8, 8))), 8, 8)
                yield Failed(self.errors.pop())  # type: ignore[arg-type]
                return
            async for event in draw(config, generation):
                yield event

        inside.engine.submit = submit  # type: ignore[method-assign]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Inside]:
    monkeypatch.setattr(jobs, "AGAIN_S", 0.01)
    yield Inside(tmp_path, max_queue=2, max_active=2)


def ended(client: TestClient, location: str) -> dict[str, Any]:
    within(TIMEOUT_S, lambda: client.get(location).json()["ended"] is not None)
    return dict(client.get(location).json())


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_a_promised_job_is_tried_again(inside: Inside, more: dict[str, Any]) -> None:
    broken = Broken(inside, [NoWorker("the worker does not start") for _ in range(3)])
    with inside.client() as client:
        location = client.post(GENERATIONS, json=CAT | more, headers=ASYNC).headers["location"]
        job = ended(client, location)
        assert (job["status"], job["response"]["status_code"]) == ("completed", 200)
        assert len(broken.seeds) == 4
        assert len(set(broken.seeds)) == 1
        assert "worker" not in str(job["response"]["body"])


def died() -> WorkerDied:
    return WorkerDied("the worker process died 2 times while drawing this")


def test_one_during_which_workers_died_is_tried_again(inside: Inside) -> None:
    """They may have been killed by something else."""
    broken = Broken(inside, [died(), NoWorker("the worker does not start"), died()])
    with inside.client() as client:
        job = ended(client, client.post(GENERATIONS, json=CAT, headers=ASYNC).headers["location"])
        assert (job["status"], len(broken.seeds), len(set(broken.seeds))) == ("completed", 4, 1)


def test_one_that_takes_workers_with_it_fails(inside: Inside) -> None:
    broken = Broken(inside, [died() for _ in range(9)])
    with inside.client() as client:
        job = ended(client, client.post(GENERATIONS, json=CAT, headers=ASYNC).headers["location"])
        assert (job["status"], job["response"]["status_code"]) == ("failed", 503)
        assert len(broken.seeds) == jobs.MAX_DEATHS == 3


FAILURES = {
    "no worker": NoWorker("the worker does not start"),
    "its workers died": died(),
    "no download": DownloadError("the hub does not answer"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_others_are_told_at_once_and_no_key_keeps_it(inside: Inside, failure: SfumatoError) -> None:
    for headers in ({}, {"idempotency-key": "k"}):
        broken = Broken(inside, [failure])
        with inside.client() as client:
            answers = [client.post(GENERATIONS, json=CAT, headers=headers) for _ in range(2)]
            assert [each.status_code for each in answers] == [503, 200]
            assert len(broken.seeds) == 2


@pytest.mark.parametrize("previews", [0, 1])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_stream_that_says_so_is_not_stored(inside: Inside, failure: SfumatoError, previews: int) -> None:
    """Its status is 200, if a preview was sent before."""
    broken = Broken(inside, [failure])
    body = CAT | {"stream": True, "partial_images": previews}
    with inside.client() as client:
        failed, drawn = (client.post(GENERATIONS, json=body, headers={"idempotency-key": "s"}) for _ in range(2))
        assert failed.status_code == (200 if previews else 503)
        assert failure.code in failed.text
        assert "image_generation.completed" in drawn.text
        assert len(broken.seeds) == 2


@pytest.mark.parametrize("failure", [FAILURES["no worker"], FAILURES["its workers died"]])
def test_lines_of_a_batch_are_tried_again(inside: Inside, failure: SfumatoError) -> None:
    Broken(inside, [failure for _ in range(2)])
    with inside.client() as client:
        files = {"file": ("a.jsonl", jsonl([CAT] * 4))}
        file = client.post("/v1/files", files=files, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file, "endpoint": GENERATIONS, "completion_window": "24h"}
        path = f"/v1/batches/{client.post('/v1/batches', json=body).json()['id']}"
        within(TIMEOUT_S, lambda: client.get(path).json()["status"] == "completed")
        assert client.get(path).json()["request_counts"] == {"total": 4, "completed": 4, "failed": 0}


def test_lines_whose_picture_cannot_be_read_now_are_tried_again(inside: Inside) -> None:
    """The database is away for a moment."""
    files = inside.app.state.batches.store.files
    content, failing = files.content, [JobsUnavailable("the database of jobs cannot be used") for _ in range(3)]

    def sometimes(id: str) -> Any:
        if failing and id == picture:
            raise failing.pop()
        return content(id)

    files.content = sometimes
    with inside.client() as client:

        def upload(data: bytes, purpose: str) -> str:
            answer = client.post("/v1/files", files={"file": ("a", data)}, data={"purpose": purpose})
            return str(answer.json()["id"])

        picture = upload(encoded(Image.new("RGB", (64, 64))), "vision")
        lines = jsonl([CAT | {"image": {"file_id": picture}}] * 2, url="/v1/images/edits")
        body = {"input_file_id": upload(lines, "batch"), "endpoint": "/v1/images/edits", "completion_window": "24h"}
        path = f"/v1/batches/{client.post('/v1/batches', json=body).json()['id']}"
        within(TIMEOUT_S, lambda: client.get(path).json()["status"] == "completed")
        assert client.get(path).json()["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    assert not failing


def test_no_more_wait_than_the_queue_holds(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "AGAIN_S", TIMEOUT_S)
    Broken(inside, [NoWorker("the worker does not start") for _ in range(2)])
    with inside.client() as client:
        waiting = []
        keyed = {"idempotency-key": "k"} | ASYNC
        for count, headers in ((1, keyed), (2, ASYNC)):
            waiting.append(client.post(GENERATIONS, json=CAT, headers=headers).headers["location"])
            within(TIMEOUT_S, lambda count=count: inside.app.state.jobs._waiting == count)
        refused = client.post(GENERATIONS, json=CAT, headers=ASYNC)
        assert refused.status_code == 429
        assert "2 accepted requests wait for a worker" in refused.json()["error"]["message"]
        assert client.post(GENERATIONS, json=CAT, headers=ASYNC | {"idempotency-key": "new"}).status_code == 429
        known = client.post(GENERATIONS, json=CAT, headers=keyed)
        assert (known.status_code, known.headers["location"]) == (202, waiting[0])
        assert client.post(GENERATIONS, json=CAT).status_code == 200
        assert client.delete(waiting[0]).json()["status"] == "cancelled"
        assert client.post(GENERATIONS, json=CAT, headers=ASYNC).status_code == 202
