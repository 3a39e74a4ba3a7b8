"""A batch whose server dies (kill -9) and is started again, that expires, and whose database cannot be written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sql
from starlette.testclient import TestClient

from sfumato.api.batches.batches import Batches
from sfumato.core import Event
from support.answerable import within
from support.batching_client import GENERATIONS, begun, counts, ended, jsonl, lines_of, sdk
from support.inside import Inside, Painter
from support.job_rows import execute, sqlite
from support.quick import FOR_EVER
from support.seeded import GATED, Server, colour, colour_of
from support.serving import TIMEOUT_S

CAT = {"prompt": "a cat", "response_format": "b64_json"}


def test_a_batch_goes_on_after_a_kill_with_the_same_pixels(tmp_path: Path) -> None:
    """Killed once while lines wait at the gate, and once when some are stored and some are drawn."""
    bodies = [CAT | {"prompt": f"cat {index}"} for index in range(6)]
    bodies += [CAT | {"prompt": f"{GATED} {index}", "n": 2} for index in range(6)]
    with Server(tmp_path, "--max-active", "4") as server, sdk(server) as client:
        id = begun(client, jsonl(bodies)).id
        within(TIMEOUT_S, lambda: any(prompt.startswith(GATED) for prompt, _ in server.drawn()))
        server.kill()
    # With room for all that wait at the gate: lines that begin together come into the queue in any order.
    with Server(tmp_path, "--max-active", "32") as server, sdk(server) as client:
        within(TIMEOUT_S, lambda: counts(client.batches.retrieve(id))["completed"] == 6)
        server.open_gate()
        within(TIMEOUT_S, lambda: counts(client.batches.retrieve(id))["completed"] > 6)
        server.kill()
    with Server(tmp_path, "--max-active", "4") as server, sdk(server) as client:
        done = ended(client, id)
        assert (done.status, counts(done)) == ("completed", {"total": 12, "completed": 12, "failed": 0})
        found = lines_of(client, done.output_file_id)
        assert [line["custom_id"] for line in found] == [f"line-{index}" for index in range(12)]
        seeds: dict[str, set[int]] = {}
        for prompt, seed in server.drawn():  # in all lives
            seeds.setdefault(prompt, set()).add(seed)
        for line, body in zip(found, bodies, strict=True):
            items = line["response"]["body"]["data"]
            assert [colour_of(item["b64_json"]) for item in items] == [colour(item["seed"]) for item in items]
            assert seeds[str(body["prompt"])] == {item["seed"] for item in items}
        assert server.client.get("/v1/images/gallery").json()["total"] == 18  # each picture once
        assert client.files.list(purpose="batch_output").data[0].id == done.output_file_id
        assert len(client.files.list().data) == 2


@pytest.mark.parametrize("point", ["accepted", "answered", "ended"])
def test_whatever_point_it_dies_at(tmp_path: Path, point: str) -> None:
    """After the batch is stored; after a line is; after its end is."""
    with Server(tmp_path, die_at=f"batch {point}") as server:
        with pytest.raises(openai.APIConnectionError), sdk(server) as client:
            ended(client, begun(client, jsonl([CAT] * 3)).id)
        assert server.wait() == -9
    with Server(tmp_path) as server, sdk(server) as client:
        (batch,) = client.batches.list().data
        done = ended(client, batch.id)
        assert (done.status, counts(done)) == ("completed", {"total": 3, "completed": 3, "failed": 0})
        assert len(lines_of(client, done.output_file_id)) == 3
        assert server.client.get("/v1/images/gallery").json()["total"] == 3
        assert len({seed for _, seed in server.drawn()}) == 3


def test_a_graceful_stop_leaves_a_batch_to_the_next_start(tmp_path: Path) -> None:
    with Server(tmp_path) as server, sdk(server) as client:
        id = begun(client, jsonl([CAT | {"prompt": GATED}] * 3)).id
        within(TIMEOUT_S, lambda: len(server.drawn()) > 0)
        assert server.stop() == 0
    server.open_gate()
    with Server(tmp_path) as server, sdk(server) as client:
        assert counts(ended(client, id)) == {"total": 3, "completed": 3, "failed": 0}


def test_a_cancelled_batch_that_its_server_did_not_end_is_not_drawn(tmp_path: Path) -> None:
    with Server(tmp_path) as server, sdk(server) as client:
        id = begun(client, jsonl([CAT | {"steps": FOR_EVER}] * 3)).id
        within(TIMEOUT_S, lambda: len(server.drawn()) > 0)
        server.kill()
    execute(sqlite(tmp_path), "UPDATE batches SET state = 'cancelling', cancelling = created")  # as another server does
    begun_before = len(server.drawn())
    with Server(tmp_path) as server, sdk(server) as client:
        done = ended(client, id)
        assert (done.status, counts(done)["failed"]) == ("cancelled", 3)
        assert len(server.drawn()) == begun_before


def test_two_servers_share_a_batch_and_one_takes_it_over(tmp_path: Path) -> None:
    database = ("--database", sqlite(tmp_path))
    with Server(tmp_path) as first, Server(tmp_path, *database, data=tmp_path / "other") as second:
        with sdk(first) as client:
            id = begun(client, jsonl([CAT | {"prompt": GATED}] * 3)).id
        within(TIMEOUT_S, lambda: len(first.drawn()) > 0)
        with sdk(second) as client:
            assert client.batches.retrieve(id).status == "in_progress"
            first.kill()
            second.open_gate()
            assert counts(ended(client, id))["completed"] == 3


def inside(tmp_path: Path) -> tuple[Inside, TestClient, Batches]:
    inside = Inside(tmp_path)
    return inside, inside.client(), inside.app.state.batches


def hold_after(engine: Painter, count: int) -> None:
    """So many pictures are drawn, and no more."""
    draw = engine.submit

    async def submit(config: Any, generation: Any) -> AsyncGenerator[Event, None]:
        if len(engine.seen) >= count:
            await asyncio.Event().wait()
        async for event in draw(config, generation):
            yield event

    engine.submit = submit  # type: ignore[method-assign]


def uploaded(client: TestClient, bodies: list[dict[str, object]]) -> str:
    files = {"file": ("a.jsonl", jsonl(bodies))}
    return str(client.post("/v1/files", files=files, data={"purpose": "batch"}).json()["id"])


def started(client: TestClient, file: str) -> str:
    body = {"input_file_id": file, "endpoint": GENERATIONS, "completion_window": "24h"}
    answer = client.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def test_a_batch_expires_after_its_window(tmp_path: Path) -> None:
    """On a clock of the test's. What was drawn is there, the rest says why it was not."""
    seconds = time.time()
    application, testing, batches = inside(tmp_path)
    batches.clock = lambda: seconds
    with testing as client:
        assert client.portal
        hold_after(application.engine, 2)
        id = started(client, uploaded(client, [CAT] * 5))
        within(TIMEOUT_S, lambda: client.get(f"/v1/batches/{id}").json()["request_counts"]["completed"] == 2)
        seconds += 86_399
        client.portal.call(batches.look)
        assert client.get(f"/v1/batches/{id}").json()["status"] == "in_progress"
        seconds += 2
        client.portal.call(batches.look)
        within(TIMEOUT_S, lambda: client.get(f"/v1/batches/{id}").json()["status"] == "expired")
        batch = client.get(f"/v1/batches/{id}").json()
        assert batch["request_counts"] == {"total": 5, "completed": 2, "failed": 3}
        assert batch["expired_at"] == batch["expires_at"] + 1
        text = client.get(f"/v1/files/{batch['error_file_id']}/content").text
        assert text.count('"response": null, "error": {"code": "batch_expired"') == 3
        # Its files go when they are too old, and then the batch.
        seconds += 720 * 3600 + 1
        client.portal.call(batches.blocking, batches.store.expire, seconds)
        assert client.get("/v1/files").json()["data"] == []
        assert client.get(f"/v1/batches/{id}").status_code == 404
    with sql.create_engine(sqlite(tmp_path)).connect() as connection:
        assert connection.execute(sql.text("SELECT count(*) FROM lines")).scalar() == 0


def test_without_room_the_rest_is_not_drawn(tmp_path: Path) -> None:
    application, testing, batches = inside(tmp_path)
    with testing as client:
        file = uploaded(client, [CAT] * 60)
        batches.store.files.max_bytes = 20_000  # the file and the lines take most of it
        id = started(client, file)
        within(TIMEOUT_S, lambda: client.get(f"/v1/batches/{id}").json()["status"] == "completed")
        batch = client.get(f"/v1/batches/{id}").json()
        counted = batch["request_counts"]
        assert counted["total"] == counted["completed"] + counted["failed"] == 60
        assert min(counted["completed"], counted["failed"]) > 0
        text = client.get(f"/v1/files/{batch['error_file_id']}/content").text
        assert text.count('"code": "file_limit_exceeded"') == counted["failed"]
        assert len(application.engine.seen) < 60
