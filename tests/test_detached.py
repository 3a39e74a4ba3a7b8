"""Requests that go on when whoever asked has gone, and how they are found again."""

from __future__ import annotations

import base64
import io
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from support.serving import TIMEOUT_S, Server

LONG = {"steps": 400, "size": "384x384"}
"""Its first preview comes after some seconds, and its end long after."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("detached")
    (folder / "models").mkdir()
    with Server(folder / "models", folder / "data", "--api-keys", "alice:alice-key,bob:bob-key") as server:
        yield server


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}-key"}


def seen(server: Server, id: str = "", name: str = "alice", **query: Any) -> list[dict[str, Any]]:
    query |= {"id": id} if id else {}
    answer = server.client.get("/v1/images/progress", params=query, headers=key(name))
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]  # type: ignore[no-any-return]


def left(server: Server, **body: Any) -> str:
    """The id of a request whose client has gone while it was drawn."""
    id = str(uuid.uuid4())
    body = {"prompt": "a cat", "stream": True, "partial_images": 3} | body
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        stream = client.stream("POST", "/v1/images/generations", json=body, headers=key("alice") | {"x-request-id": id})
        with stream as answer:
            # The first preview; comments that keep the connection open may come before.
            next(line for line in answer.iter_lines() if line.startswith("data:"))
    return id


def until(server: Server, id: str, *states: str) -> dict[str, Any]:
    deadline = time.monotonic() + TIMEOUT_S
    while (now := seen(server, id)[0])["status"] not in states:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
    return now


def test_it_is_drawn_to_its_end_and_found_again(server: Server) -> None:
    id = left(server, detached=True, steps=60, n=2, seed=5)
    done = until(server, id, "completed", "failed", "cancelled")
    assert (done["status"], done["prompt"], done["error"]) == ("completed", "a cat", None)
    assert [(each["index"], each["seed"]) for each in done["kept"]] == [(0, 5), (1, 6)]
    for each in done["kept"]:
        assert Image.open(io.BytesIO(server.client.get(f"/generated-images/{each['name']}").content)).size == (128, 128)


def test_without_that_word_it_ends_with_its_client(server: Server) -> None:
    id = left(server, **LONG)
    assert until(server, id, "completed", "cancelled")["status"] == "cancelled"


def test_it_can_be_looked_at_and_cancelled_from_afar(server: Server) -> None:
    id = left(server, detached=True, **LONG)
    (now,) = seen(server, id, preview=True)
    assert now["status"] == "drawing"
    assert Image.open(io.BytesIO(base64.b64decode(now["preview"]["b64_json"]))).size == (384, 384)
    assert [each["id"] for each in seen(server)] == [id]
    assert seen(server, name="bob") == seen(server, id, name="bob") == []
    assert seen(server, "no-such-request") == []
    server.client.delete(f"/v1/images/progress/{id}", headers=key("alice"))
    assert seen(server, id)[0]["status"] == "cancelled"
    assert seen(server) == []


def test_why_it_failed_is_told_afterwards(server: Server, tmp_path: Path) -> None:
    id = str(uuid.uuid4())
    headers = key("alice") | {"x-request-id": id}
    refused = server.client.post("/v1/images/generations", json={"prompt": "x", "size": "100x100"}, headers=headers)
    assert refused.status_code == 400
    assert seen(server, id)[0]["error"]["message"] == refused.json()["error"]["message"]
