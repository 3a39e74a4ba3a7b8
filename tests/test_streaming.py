"""Pictures as they appear: events, progress, cancellation, and the line in front of them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from sfumato.api.openai import answers
from support import quick
from support.answerable import within
from support.held import LONG, Held
from support.serving import Server


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One picture at a time, one may wait."""
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "models").mkdir()
    with Server(folder / "models", folder / "data", "--max-active", "1", "--max-queue", "1") as server:
        yield server


def events(server: Server, body: Mapping[str, Any], path: str = "/v1/images/generations") -> list[dict[str, Any]]:
    with server.client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = []
        for block in answer.read().decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if lines:
                found.append(json.loads(lines["data"]))
                assert lines.get("event") == found[-1].get("type")
    return found


def picture_of(event: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(event["b64_json"])))


def progress(server: Server, id: str) -> dict[str, Any]:
    return dict(server.client.get(f"/v1/images/progress/{id}").json())


@pytest.mark.parametrize("previews", [0, 1, 2, 3])
def test_previews_then_the_picture(server: Server, previews: int) -> None:
    body = {"prompt": "a rocket on a blue background", "seed": 1, "partial_images": previews}
    *partial, completed = events(server, body)
    assert [event["type"] for event in partial] == ["image_generation.partial_image"] * previews
    assert [event["partial_image_index"] for event in partial] == list(range(previews))
    assert completed["type"] == "image_generation.completed"
    assert "index" not in completed
    assert set(completed["usage"]) == {"input_tokens", "input_tokens_details", "output_tokens", "total_tokens"}
    for event in (*partial, completed):
        assert event["created_at"] > 0
        assert {"background", "output_format", "quality", "size"} <= set(event)
    final = picture_of(completed)
    assert final.size == (128, 128)
    plain = server.draw(prompt=body["prompt"], seed=1, response_format="b64_json").json()["data"][0]
    assert np.array_equal(np.asarray(final), np.asarray(picture_of(plain)))
    differences = [
        np.abs(np.asarray(picture_of(event).convert("RGB"), float) - np.asarray(final, float)).mean()
        for event in partial
    ]
    assert differences == sorted(differences, reverse=True)  # the picture comes out of the smoke


def test_several_pictures_complete_in_order(server: Server) -> None:
    found = events(server, {"prompt": "a cat", "seed": 5, "n": 3, "steps": 4, "partial_images": 1})
    assert [event["index"] for event in found if event["type"].endswith("completed")] == [0, 1, 2]
    assert [event["seed"] for event in found if event["type"].endswith("completed")] == [5, 6, 7]
    assert sorted(event["index"] for event in found if event["type"].endswith("partial_image")) == [0, 1, 2]


def test_previews_have_the_format_asked_for(server: Server) -> None:
    body = {"prompt": "a cat", "steps": 4, "partial_images": 2, "output_format": "jpeg"}
    assert [picture_of(event).format for event in events(server, body)] == ["JPEG"] * 3


def test_edits_stream_too(server: Server) -> None:
    body = {"prompt": "a cat", "steps": 8, "partial_images": 2, "image": server.png_data_uri((128, 128))}
    kinds = [event["type"] for event in events(server, body, "/v1/images/edits")]
    assert kinds == ["image_edit.partial_image", "image_edit.partial_image", "image_edit.completed"]


def test_what_is_wrong_from_the_start_is_no_stream(server: Server) -> None:
    for fields, status in (({"size": "100x100"}, 400), ({"model": "none"}, 404), ({"scheduler": "none"}, 400)):
        answer = server.draw(prompt="a cat", stream=True, **fields)
        assert answer.status_code == status
        assert answer.json()["error"]["param"] == next(iter(fields))


def test_an_error_on_the_way_is_an_event(tmp_path: Path) -> None:
    with quick.Server(tmp_path, tmp_path / "data", "--time-limit-s", "2") as server:
        *_, last = events(server, {"prompt": "a cat", "steps": quick.FOR_EVER, "partial_images": 3})
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert last["error"]["code"] == "timeout"


def test_a_stream_that_is_dropped_stops_the_work(server: Server) -> None:
    lines = len(server.lines)
    body = {**LONG, "stream": True, "partial_images": 3}
    headers = {"x-request-id": "dropped"}
    with server.client.stream("POST", "/v1/images/generations", json=body, headers=headers) as answer:
        assert answer.status_code == 200
        within(120, lambda: progress(server, "dropped")["step"] > 0)
    server.wait_for(r"was cancelled with \d+ steps left", after=lines)
    within(120, lambda: progress(server, "dropped")["status"] == "cancelled")


def test_a_stream_with_nothing_to_say_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "KEEP_ALIVE_S", 0.01)

    async def run() -> None:
        go = asyncio.Event()

        async def lines() -> AsyncGenerator[str, None]:
            yield "first"
            await go.wait()
            yield "second"

        seen = []
        async for line in answers._with_keep_alive(lines()):
            seen.append(line)
            if line.startswith(":"):
                go.set()
        assert (seen[0], seen[-1]) == ("first", "second")
        assert ": keep-alive\n\n" in seen

    asyncio.run(run())


def test_progress_and_cancel_by_id(server: Server) -> None:
    with Held(server) as held:
        seen = held.drawing()
        assert (seen["object"], seen["status"], seen["model"]) == ("image.progress", "drawing", "sfumato-tiny")
        assert (seen["total"], seen["pictures"], seen["pictures_done"], seen["queue_position"]) == (900, 1, 0, 0)
        assert held.drawing(steps=3)["seconds_left"] > 0
        with ThreadPoolExecutor(1) as pool:
            neighbour = pool.submit(server.draw, prompt="a cat", steps=4)
            gone = server.client.delete(f"/v1/images/progress/{held.id}")
            assert (gone.status_code, gone.json()["status"]) == (200, "cancelled")
            assert neighbour.result().status_code == 200
        cancelled = held.answer()
        assert cancelled.status_code == 499
        assert cancelled.json()["error"]["code"] == "cancelled"
        assert cancelled.headers["x-should-retry"] == "false"
        assert held.progress()["status"] == "cancelled"


def test_progress_of_what_is_done_and_of_what_never_was(server: Server) -> None:
    answer = server.draw(prompt="a cat", steps=4, n=2)
    seen = progress(server, answer.headers["x-request-id"])
    assert (seen["status"], seen["step"], seen["total"], seen["pictures_done"]) == ("completed", 8, 8, 2)
    for method in ("GET", "DELETE"):
        missing = server.client.request(method, "/v1/images/progress/never")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "request_not_found"


def test_row_07_a_cancel_ends_one_request_and_not_the_one_that_starts(server: Server) -> None:
    with Held(server) as first, ThreadPoolExecutor(1) as pool:
        first.drawing()
        second = pool.submit(server.draw, prompt="a cat", steps=30)
        assert first.cancel().status_code == 499
        assert second.result().status_code == 200


def test_row_21_a_full_line_answers_429(narrow: Server) -> None:
    with Held(narrow) as running:
        running.drawing()
        with Held(narrow) as waiting:
            seen = waiting.until(lambda seen: seen["queue_position"])
            assert (seen["status"], seen["queue_position"]) == ("queued", 1)
            refused = narrow.draw(prompt="a cat")
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(refused.headers["retry-after"]) <= 120
            assert {waiting.cancel().status_code, running.cancel().status_code} == {499}
    assert narrow.draw(prompt="a cat", steps=2).status_code == 200


def test_a_callers_burst_does_not_make_another_wait_and_each_sees_its_own(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    flags = ("--max-active", "3", "--api-keys", "ann:key-a,bob:key-b")
    with Server(tmp_path / "models", tmp_path / "data", *flags) as server:

        def asked(key: str, method: str = "GET") -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"}
            return server.client.request(method, f"/v1/images/progress/{burst.id}", headers=headers)

        with Held(server, {**LONG, "n": 8}, headers={"authorization": "Bearer key-a"}) as burst:
            burst.drawing()
            body = {"prompt": "a cat", "steps": 2}
            single = server.client.post("/v1/images/generations", json=body, headers={"authorization": "Bearer key-b"})
            assert single.status_code == 200
            standing = burst.progress()
            assert (standing["status"], standing["pictures_done"], standing["queue_position"]) == ("drawing", 0, 1)
            assert asked("key-b").status_code == 404
            assert asked("key-b", "DELETE").status_code == 404
            assert asked("key-a", "DELETE").json()["status"] == "cancelled"
            assert burst.answer().status_code == 499
