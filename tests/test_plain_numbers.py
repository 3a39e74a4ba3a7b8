"""Numbers in forms, queries, headers and texts of JSON: in plain digits, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from starlette.testclient import TestClient

from sfumato.errors import in_words
from support.inside import Inside

SWITCHES = (True, False)
"""What JSON has, and Python takes for 1 and 0."""

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
            assert answer.json()["error"]["param"] == name, answer.text
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
            assert answer.json()["error"]["param"] == name, answer.text


@pytest.mark.parametrize("value", [*WRONG, *SWITCHES])
def test_of_objects_inside_others(client: TestClient, value: Any) -> None:
    loras = ({name: value} for name in ("weight", "text_weight"))
    controls = ({name: value} for name in ("weight", "start", "end", "mode"))
    fields = [
        *({"loras": [{"name": "a", **each}]} for each in loras),
        *({"controls": [{"image": "AAAA", **each}]} for each in controls),
    ]
    for field in fields:
        answer = client.post("/v1/images/generations", json={"prompt": "a cat"} | field)
        assert answer.status_code == 400, (field, answer.text)
        assert "weight" in answer.text or "controls[0]" in answer.text, answer.text
    unit = {"image": "AAAA", "model": "a", "weight": value}
    scripts = {"alwayson_scripts": {"controlnet": {"args": [unit]}}}
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a cat"} | scripts)
    assert answer.status_code == 400, answer.text
    assert f"weight: {in_words(value)} is no number" in answer.text, answer.text


def test_of_what_is_inside_a_form(client: TestClient) -> None:
    for value in WRONG:
        files = {"file": ("a", b"x"), "expires_after[anchor]": (None, "created_at")}
        files["expires_after[seconds]"] = (None, value.replace("1", "3600"))
        answer = client.post("/v1/files", files=files, data={"purpose": "batch"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_after")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/files", "/v1/batches", "/v1/videos", "/v1/images/gallery"])
def test_of_a_query(client: TestClient, path: str) -> None:
    assert client.get(path, params={"limit": "10"}).status_code == 200
    for value in WRONG:
        assert client.get(path, params={"limit": value}).status_code == 400, value


def is_number(schema: Mapping[str, Any]) -> bool:
    """Whether a field takes numbers, perhaps besides texts, and no switches."""
    kinds = {each.get("type") for each in schema.get("anyOf", [schema])}
    return bool(kinds & {"integer", "number"}) and "boolean" not in kinds


REQUIRED: Mapping[str, Any] = {
    "prompt": "a cat", "text": "a cat", "input": "a cat", "image": "AAAA", "init_images": ["AAAA"], "images": ["AAAA"],
    "model": "m", "messages": [{"role": "user", "content": "a cat"}], "mask": "AAAA", "enable_hr": True,
}  # fmt: skip
"""What the bodies of drawing routes need, by name."""

IS_SWITCH = {"inpainting_mask_invert"}
"""0 and 1 in AUTOMATIC1111, and no other numbers."""


def test_no_number_of_any_body_is_a_switch(client: TestClient) -> None:
    """Of all that OpenAPI lists, under all of its names."""
    tried = 0
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        fields = content.get("application/json", {}).get("schema", {}).get("properties", {})
        sent = {name: value for name, value in REQUIRED.items() if name in fields}
        for name in (name for name, schema in fields.items() if is_number(schema) and name not in IS_SWITCH):
            for value in SWITCHES:
                answer = client.post(path, json=sent | {name: value})
                assert answer.status_code in (400, 422), (path, name, value, answer.status_code, answer.text)
                assert f"{name}: {json.dumps(value)}" in answer.text, (path, name, value, answer.text)
                tried += 1
    assert tried > 300
