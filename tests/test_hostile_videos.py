"""Hostile requests for clips: each is a 4xx that names the field, before any work, and the server answers the next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from support.answerable import within
from support.drawing import source
from support.families_moving import FAMILIES
from support.serving import TIMEOUT_S, Server

SMALL: dict[str, Any] = {
    "prompt": "a cat", "width": 16, "height": 16, "num_frames": 5, "fps": 8, "num_inference_steps": 2,
    "output_format": "webp",
}  # fmt: skip
PATHS = ("/v1/videos", "/v1/videos/sync", "/video")
KEYS = "ann:key-a,bob:key-b"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = tmp_path_factory.mktemp("hostile-videos")
    FAMILIES["Wan"].build().save_pretrained(models / "weights" / "film")
    (models / "film.yaml").write_text("name: film\nparameters: {model: weights/film}\n")
    data = tmp_path_factory.mktemp("data")
    with Server(models, data, "--default-model", "film", "--api-keys", KEYS) as server:
        server.client.headers["authorization"] = "Bearer key-a"
        # What takes longer than an answer at once is read here: diffusers' source of the class.
        assert server.client.post("/v1/videos/sync", json=SMALL | {"width": 24}).status_code == 400
        yield server


SIZES = ("x", "16", "16x", "x16", "0x0", "-16x16", "16x16x16", "99999999999x1", "1e9x1e9", "16\0x16", 16, [16, 16], {})
HUGE = 10**300
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"num_frames": value}, "num_frames") for value in (0, -1, 1e9, 2**31, 2**63, HUGE, 5.5, "x", [5], {})),
    *(({"fps": value}, "fps") for value in (0, -1, 1e-9, 1e300, HUGE, "x", [8], {})),
    *(({"seconds": value, "num_frames": None}, "seconds") for value in (0, -1, 1e300, HUGE, "x", [1], {})),
    ({"seconds": 60, "fps": 60, "num_frames": None}, "seconds"),
    ({"num_frames": 257, "width": 4096, "height": 4096}, "size"),
    ({"num_frames": 257, "width": 2048, "height": 2048}, "num_frames"),
    ({"width": 2**62, "height": 2**62}, "width"),
    ({"width": HUGE, "height": 16}, "width"),
    ({"width": 0, "height": 0}, "width"),
    ({"width": -16, "height": -16}, "width"),
    *(({"width": None, "height": None, "size": value}, "size") for value in SIZES),
    ({"size": "16x16"}, "width"),
    *(({"loras": value}, "loras") for value in ("x", 1, [1], [{}], [{"name": 5}], [{"name": "../../etc/passwd"}])),
    ({"loras": [{"name": "x", "weight": 1e300}]}, "loras"),
    ({"input_reference": {}}, "input_reference"),
    ({"input_reference": 5}, "input_reference"),
    ({"input_reference": ["a", "b"]}, "input_reference"),
    ({"end_image": ["a", "b"]}, "end_image"),
    ({"prompt": "x" * 10**6}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"n": 2}, "n"),
    ({"n": HUGE}, "n"),
    ({"output_format": "../mp4"}, "output_format"),
    ({"model": "film\0"}, "model"),
    ({"seed": HUGE}, "seed"),
    ({"num_inference_steps": HUGE}, "num_inference_steps"),
]  # fmt: skip


def told(answer: Any) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["param"]


@pytest.mark.parametrize(
    ("fields", "param"), REFUSED, ids=[f"{number}-{each[1]}" for number, each in enumerate(REFUSED)]
)
def test_each_is_refused_by_its_field(server: Server, fields: dict[str, Any], param: str) -> None:
    for path in PATHS:
        answer = server.client.post(path, json=SMALL | fields)
        status, named = told(answer)
        assert 400 <= status < 500 and named and named.startswith(param), (path, answer.text[:500])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["fps", "seconds", "num_frames", "guidance_scale"])
def test_numbers_that_are_none(server: Server, field: str, value: str) -> None:
    body = (
        json.dumps({name: each for name, each in SMALL.items() if name != field}).rstrip("}")
        + f', "{field}": {value}}}'
    )
    form = {name: str(each) for name, each in SMALL.items()} | {field: value}
    for path in PATHS:
        answer = server.client.post(path, content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, (path, answer.text[:300])
        status, named = told(server.client.post(path, data=form))
        assert (400 <= status < 500, named) == (True, field), path


def test_a_form_with_two_pictures(server: Server) -> None:
    files = [("input_reference", ("a.png", source(16, 16))), ("input_reference", ("b.png", source(16, 16)))]
    for path in PATHS:
        answer = server.client.post(path, data={name: str(each) for name, each in SMALL.items()}, files=files)
        assert told(answer) == (400, "input_reference"), answer.text


def test_ids_of_nobody(server: Server) -> None:
    for id in ("a%00b", "%00", "..%2f..%2fetc", "a" * 5000, "%ff", "' OR 1=1 --", "*"):
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            answer = server.client.request(method, f"/v1/videos/{id}{path}")
            assert answer.status_code in (400, 404), (id, method, answer.text[:300])
        assert server.client.get("/v1/videos", params={"after": id.replace("%00", "\0")}).status_code in (400, 404)
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=", "limit=1e9"):
        assert server.client.get(f"/v1/videos?{query}").status_code in (200, 400), query


def test_a_clip_of_another_caller_is_not_there(server: Server) -> None:
    id = server.client.post("/v1/videos", json=SMALL | {"num_inference_steps": 500}).json()["id"]
    within(TIMEOUT_S, lambda: server.client.get(f"/v1/videos/{id}").json()["status"] == "in_progress")
    other = {"authorization": "Bearer key-b"}
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        answer = server.client.request(method, f"/v1/videos/{id}{path}", headers=other)
        assert answer.status_code == 404, (method, path)
    listed = server.client.get("/v1/videos", headers=other).json()["data"]
    assert id not in [each["id"] for each in listed]
    assert told(server.client.get("/v1/videos", params={"after": id}, headers=other)) == (400, "after")
    assert server.client.get(f"/v1/videos/{id}").json()["status"] == "in_progress"
    for variant in ("thumbnail", "spritesheet", "", "video\0"):
        answer = server.client.get(f"/v1/videos/{id}/content", params={"variant": variant})
        assert told(answer) == (400, "variant"), answer.text
    assert server.client.delete(f"/v1/videos/{id}").json()["deleted"]
    assert server.client.delete(f"/v1/videos/{id}").status_code == 404
    assert server.client.post("/v1/videos/sync", json=SMALL).status_code == 200
