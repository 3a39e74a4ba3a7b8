"""Hugging Face's inference API: the official client over a real socket, its shapes, and errors that it can read."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from starlette.testclient import TestClient

import sfumato
from sfumato.core import Generation
from support.inside import Inside
from support.pictures import encoded
from support.serving import Server

TINY = Path(sfumato.__file__).parent / "models" / "sfumato-tiny"
PHOTO = Image.radial_gradient("L").convert("RGB").resize((128, 128))
RAW = encoded(PHOTO)
BASE64 = base64.b64encode(RAW).decode()


def recipe(picture: Image.Image) -> dict[str, Any]:
    return dict(json.loads(picture.info["sfumato"]))


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model whose name has a slash, as on the hub; with a key."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "models").mkdir()
    (folder / "models" / "a.yaml").write_text(f"name: someone/tiny\nparameters: {{model: {TINY}}}\nsize: 128x128\n")
    with Server(folder / "models", folder / "data", "--api-keys", "anna:key-a") as server:
        yield server


@pytest.mark.parametrize("path", ["", "/", "/models/sfumato-tiny", "/models/gpt-image-1"])
def test_text_to_image(server: Server, path: str) -> None:
    client = InferenceClient(base_url=server.url + path)
    picture = client.text_to_image("a cat on a green background", num_inference_steps=2, seed=7, width=64, height=96)
    assert (picture.format, picture.size) == ("PNG", (64, 96))
    made = recipe(picture)
    assert (made["prompt"], made["steps"], made["seed"]) == ("a cat on a green background", 2, 7)


def test_the_model_may_be_the_url(strict: Server) -> None:
    url = f"{strict.url}/models/someone/tiny"
    client = InferenceClient(model=url, api_key="key-a")
    picture = client.text_to_image(
        "a cat",
        negative_prompt="blue",
        guidance_scale=4,
        scheduler="ddim",
        extra_body={"steps": 2, "output_format": "webp"},
    )
    assert (picture.format, picture.size) == ("WEBP", (128, 128))
    again = InferenceClient(api_key="key-a").text_to_image("a cat", model=url, num_inference_steps=2)
    made = recipe(again)
    assert (made["model"], made["steps"]) == ("someone/tiny", 2)


def test_image_to_image(server: Server, tmp_path: Path) -> None:
    client = InferenceClient(base_url=f"{server.url}/models/sfumato-tiny")
    (tmp_path / "photo.png").write_bytes(RAW)
    for source in (RAW, tmp_path / "photo.png", str(tmp_path / "photo.png")):
        picture = client.image_to_image(source, prompt="a cat", num_inference_steps=4, strength=0.5, seed=1)
        made = recipe(picture)
        assert (made["prompt"], made["strength"], len(made["image_sha256"])) == ("a cat", 0.5, 1)
    sized = client.image_to_image(RAW, prompt="a cat", num_inference_steps=4, target_size={"width": 64, "height": 64})
    assert sized.size == (64, 64)


def test_image_to_image_without_parameters_is_the_file_itself(server: Server, tmp_path: Path) -> None:
    client = InferenceClient(base_url=f"{server.url}/models/sfumato-tiny")
    (tmp_path / "photo.png").write_bytes(RAW)
    for source in (RAW, tmp_path / "photo.png"):  # without a content type, and with one
        made = recipe(client.image_to_image(source))
        assert (made["prompt"], len(made["image_sha256"])) == ("", 1)
    assert len(recipe(client.image_to_image(RAW, guidance_scale=2))["image_sha256"]) == 1  # base64, and no prompt


def test_errors_are_texts_that_the_client_shows(server: Server, strict: Server) -> None:
    cases: list[tuple[str, str | None, dict[str, Any], int, str]] = [
        (f"{server.url}/models/no-such", None, {}, 404, "There is no model 'no-such'"),
        (f"{server.url}/models/sfumato-tiny", None, {"width": 100, "height": 100}, 400, "size"),
        (f"{server.url}/models/sfumato-tiny", None, {"width": 64}, 400, "height: send both"),
        (f"{strict.url}/models/someone/tiny", "wrong", {}, 401, "the API key is not valid"),
        (strict.url, "wrong", {}, 401, "the API key is not valid"),
    ]
    for url, key, parameters, status, words in cases:
        with pytest.raises(HfHubHTTPError) as refused:
            InferenceClient(base_url=url, api_key=key).text_to_image("a cat", **parameters)
        assert refused.value.response.status_code == status
        assert words in str(refused.value)


# What the engine gets of it, without an engine


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Inside:
    return Inside(tmp_path_factory.mktemp("inside"))


@pytest.fixture(scope="module")
def http(inside: Inside) -> Iterator[TestClient]:
    with inside.client() as client:
        yield client


def drawn(inside: Inside, http: TestClient, **body: Any) -> Generation:
    inside.engine.seen.clear()
    answer = http.post("/models/m", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    (generation,) = inside.engine.seen
    return generation


@pytest.mark.parametrize(
    ("body", "prompt", "pictures"),
    [
        ({"inputs": "a cat"}, "a cat", 0),
        ({"inputs": "a cat", "parameters": {}}, "a cat", 0),
        ({"inputs": "a cat", "parameters": None}, "a cat", 0),
        ({"inputs": BASE64, "parameters": {"prompt": "a dog"}}, "a dog", 1),
        ({"inputs": f"data:image/png;base64,{BASE64}", "parameters": {"prompt": "a dog"}}, "a dog", 1),
        ({"inputs": BASE64}, "", 1),
        ({"inputs": "a cat", "parameters": {"prompt": None}}, "a cat", 0),
        ({"inputs": BASE64, "parameters": {"prompt": None}}, "", 1),
        ({"inputs": "a cat", "image": []}, "a cat", 0),
        ({"inputs": "a cat", "image": [BASE64]}, "a cat", 1),
        ({"inputs": BASE64, "parameters": {"guidance_scale": 2}}, "", 1),
        ({"inputs": "/9j/ is no picture"}, "/9j/ is no picture", 0),
        ({"inputs": "a cat", "parameters": {"ref_images": [BASE64]}}, "a cat", 1),
    ],
)
def test_inputs(inside: Inside, http: TestClient, body: dict[str, Any], prompt: str, pictures: int) -> None:
    generation = drawn(inside, http, **body)
    assert (generation.prompt, len(generation.images)) == (prompt, pictures)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "inputs: must be a text"),
        ({"inputs": ["a", "b"]}, "inputs: must be a text"),
        ({"inputs": 5, "parameters": 7, "image": []}, "inputs: must be a text"),
        ({"inputs": "a cat", "parameters": 7, "image": None}, "parameters: must be an object"),
        ({"inputs": "a cat", "parameters": [1]}, "parameters: must be an object"),
        ({"inputs": "a cat", "parameters": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"inputs": "a cat", "parameters": {"n": 2}}, "n: 2; this API answers with one picture"),
        ({"inputs": "a cat", "parameters": {"width": 64.5, "height": 64}}, "width: send both"),
        ({"inputs": "a cat", "parameters": {"target_size": {"width": 64}}}, "target_size: send both"),
        ({"inputs": "no picture", "parameters": {"prompt": "a cat"}}, "image"),
    ],
)
def test_what_is_wrong_is_told_in_its_shape(http: TestClient, body: dict[str, Any], words: str) -> None:
    answer = http.post("/models/m", json=body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"}
    assert words in answer.json()["error"]


def test_other_errors_have_its_shape_too(tmp_path: Path) -> None:
    inside = Inside(tmp_path, api_keys="anna:key-a", max_body_mb=1)
    with inside.client() as client:
        key = {"authorization": "Bearer key-a"}
        body = {"inputs": "a cat"}
        for path in ("/", "/models/m"):
            answers = {
                401: client.post(path, json=body),
                413: client.post(path, content=b" " * (2**20 + 1), headers=key),
                415: client.post(path, content=b"x", headers={**key, "content-type": "text/csv"}),
            }
            for status, answer in answers.items():
                assert answer.status_code == status, answer.text
                assert isinstance(answer.json()["error"], str)
    with Inside(tmp_path).client() as client:
        for path in ("/", "/models/m"):
            answer = client.post(path, json=body, headers={"origin": "https://elsewhere.example"})
            assert (answer.status_code, type(answer.json()["error"])) == (403, str)


def test_other_routes_keep_their_errors(strict: Server) -> None:
    key = {"authorization": "Bearer key-a"}
    for answer in (
        strict.client.get("/models/none", headers=key),
        strict.client.post("/models/load", json={"model": "none"}, headers=key),
        strict.client.post("/v1/models/unload", json={"model": "none"}, headers=key),
        strict.client.get("/v1/models"),
    ):
        assert answer.status_code in (401, 404)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert strict.client.get("/").status_code == 200  # the page needs no key, but who posts does


@pytest.mark.parametrize(
    ("accept", "type"),
    [("image/png", "png"), ("image/webp, image/png", "webp"), ("image/jpg;q=0.9", "jpeg"), ("*/*", "png"), ("", "png")],
)
def test_the_format(http: TestClient, accept: str, type: str) -> None:
    answer = http.post("/models/m", json={"inputs": "a cat"}, headers={"accept": accept})
    assert answer.headers["content-type"] == f"image/{type}"
    assert Image.open(io.BytesIO(answer.content)).format == type.upper()
    own = http.post(
        "/models/m", json={"inputs": "a cat", "parameters": {"output_format": "webp"}}, headers={"accept": accept}
    )
    assert own.headers["content-type"] == "image/webp"


def test_what_has_no_effect_is_listed(http: TestClient) -> None:
    body = {"inputs": "a cat", "parameters": {"stream": True, "foo": 1}, "options": {"wait_for_model": True}}
    answer = http.post("/models/m", json=body)
    assert set(answer.headers["x-sfumato-ignored"].split(", ")) == {"stream", "foo", "options"}
