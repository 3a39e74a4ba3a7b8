"""Numbers in forms, queries, headers and texts of JSON: in plain digits, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from support.inside import Inside

WRONG = ["1_0", "\u0661\u0660", "inf", "nan", "0x10", "1__0", "ten", "1,5"]
"""What Python's int and float read among them, or what people write."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    inside = Inside(tmp_path_factory.mktemp("numbers"))
    text = "name: m\nparameters: {model: some/one}\ndiffusers: {enable_parameters: 'image,num_inference_steps'}\n"
    (inside.service.catalog._folders[0] / "m.yaml").write_text(text)
    with inside.client() as client:
        yield client


NAMES = ("n", "seed", "steps", "cfg_scale", "output_compression", "partial_images", "keep_alive")


@pytest.mark.parametrize("name", NAMES)
def test_of_a_form_and_of_json(client: TestClient, name: str) -> None:
    path, body = "/v1/images/generations", {"prompt": "a cat"}
    for value in WRONG:
        for sent in ({"data": body | {name: value}}, {"json": body | {name: value}}):
            answer = client.post(path, **sent)
            assert answer.status_code == 400, (value, answer.text)
            assert name in answer.json()["error"]["message"], answer.text
    for value in ("1", " 1 ", "+1"):
        if name != "keep_alive" or value != "+1":
            assert client.post(path, data=body | {name: value}).status_code == 200, value
    assert client.post(path, data=body | {name: ""}).status_code == 200


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *(("/v1/videos/sync", name) for name in ("num_frames", "fps", "seconds", "width", "num_inference_steps")),
        *(("/v1/audio/generate", name) for name in ("audio_length", "speed", "bpm", "guidance_scale")),
    ],
)
def test_of_clips_and_sounds(client: TestClient, path: str, name: str) -> None:
    for value in WRONG:
        body = {"prompt": "a cat", "input": "a cat", name: value}
        for sent in ({"data": body}, {"json": body}):
            answer = client.post(path, **sent)  # type: ignore[arg-type]
            assert answer.status_code == 400, (value, answer.text)
            assert name in answer.json()["error"]["message"], answer.text


def test_of_what_is_inside_others(client: TestClient) -> None:
    for value in WRONG:
        lora = {"name": "a", "weight": value}
        for field in ({"loras": [lora]}, {"controls": [{"image": "AAAA", "weight": value}]}):
            answer = client.post("/v1/images/generations", json={"prompt": "a cat"} | field)
            assert answer.status_code == 400
            assert "weight" in answer.text, answer.text
        files = {"file": ("a", b"x"), "expires_after[anchor]": (None, "created_at")}
        files["expires_after[seconds]"] = (None, value.replace("1", "3600"))
        answer = client.post("/v1/files", files=files, data={"purpose": "batch"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_after")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/files", "/v1/batches", "/v1/videos", "/v1/images/gallery"])
def test_of_a_query(client: TestClient, path: str) -> None:
    assert client.get(path, params={"limit": "10"}).status_code == 200
    for value in WRONG:
        assert client.get(path, params={"limit": value}).status_code == 400, value
