"""Ollama's clients: its own Python package over a real socket, and what others send, field by field."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import pytest
from PIL import Image

from support.answerable import within
from support.held import Held
from support.inside import Inside
from support.pictures import encoded
from support.serving import Server

MODEL = "sfumato-tiny:latest"
SMALL = {"width": 64, "height": 64, "steps": 3}
PHOTO = encoded(Image.radial_gradient("L").convert("RGB").resize((64, 64)))


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[ollama.Client]:
    with ollama.Client(server.url) as client:
        yield client


def opened(text: str | None) -> Image.Image:
    assert text
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def recipe(text: str | None) -> dict[str, Any]:
    return dict(json.loads(opened(text).info["sfumato"]))


def test_the_package_draws(client: ollama.Client) -> None:
    answer = client.generate(MODEL, "a cat", **SMALL, options={"seed": 7, "negative_prompt": "blue"})
    assert (answer.model, answer.done, answer.done_reason, answer.response) == (MODEL, True, "stop", "")
    assert opened(answer.image).size == (64, 64)
    made = recipe(answer.image)
    assert [made[name] for name in ("seed", "steps", "negative_prompt")] == [7, 3, "blue"]
    assert answer.total_duration
    assert answer.load_duration
    assert answer.load_duration < answer.total_duration
    assert (answer.completed, answer.total) == (3, 3)


def test_the_package_streams(client: ollama.Client) -> None:
    parts = list(client.generate(MODEL, "a cat", stream=True, **SMALL, options={"seed": 7}))
    *steps, last = parts
    assert [(part.completed, part.total, part.done, part.image) for part in steps] == [
        (step, 3, False, None) for step in (1, 2, 3)
    ]
    assert (last.done, last.completed, last.total) == (True, 3, 3)
    assert recipe(last.image)["seed"] == 7


def test_the_same_picture_as_of_openais_route(server: Server, client: ollama.Client) -> None:
    same = {"prompt": "a cat", "seed": 7, "steps": 3, "size": "64x64", "response_format": "b64_json"}
    theirs = opened(server.draw(**same).json()["data"][0]["b64_json"])
    ours = opened(client.generate(MODEL, "a cat", **SMALL, options={"seed": 7}).image)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_bar_in_the_prompt_is_text(client: ollama.Client) -> None:
    assert recipe(client.generate(MODEL, "a cat|blue", **SMALL).image)["prompt"] == "a cat|blue"


def test_pictures_to_draw_from(client: ollama.Client) -> None:
    answer = client.generate(MODEL, "a cat", images=[PHOTO], steps=3, options={"strength": 0.5})
    made = recipe(answer.image)
    assert (len(made["image_sha256"]), made["strength"]) == (1, 0.5)


def test_lists(client: ollama.Client) -> None:
    listed = {model.model: model for model in client.list().models}
    assert listed[MODEL].digest
    assert listed[MODEL].modified_at
    for name in (MODEL, "sfumato-tiny"):
        shown = client.show(name)
        assert shown.capabilities == ["image", "vision"]
        assert shown.details
        assert shown.details.family == "StableDiffusionPipeline"
        # What oterm does with them.
        parameters = dict(line.split(maxsplit=1) for line in (shown.parameters or "").splitlines())
        assert parameters["steps"] == str(json.loads(parameters["steps"]))


def test_a_request_without_a_prompt_loads_and_unloads(client: ollama.Client) -> None:
    assert client.generate(MODEL).done_reason == "load"
    (loaded,) = [model for model in client.ps().models if model.model == MODEL]
    assert loaded.size
    assert client.generate(MODEL, keep_alive=0).done_reason == "unload"
    assert MODEL not in [model.model for model in client.ps().models]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_as_the_package_reads_them(client: ollama.Client, stream: bool) -> None:
    for fields, status, word in (({"model": "nope"}, 404, "not found"), ({"steps": 10_000}, 400, "steps: 10000")):
        with pytest.raises(ollama.ResponseError, match=word) as caught:
            list(client.generate(**{"model": MODEL, "prompt": "a cat", "stream": stream} | fields))
        assert caught.value.status_code == status


def test_text_is_refused_in_ollamas_words(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match=f'"{MODEL}" does not support chat') as caught:
        client.chat(MODEL, [{"role": "user", "content": "hello"}])
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="does not support embeddings"):
        client.embed(MODEL, "hello")
    with pytest.raises(ollama.ResponseError, match="model 'llama3' not found") as caught:
        client.chat("llama3", [{"role": "user", "content": "hello"}])
    assert caught.value.status_code == 404
    for refused in (client.pull, client.delete, client.push):
        with pytest.raises(ollama.ResponseError, match="sfumato add") as caught:
            refused("llama3")
        assert caught.value.status_code == 400


def test_oterm(server: Server) -> None:
    """Its tool generate_image: the package's AsyncClient, a model, a prompt and nothing else."""

    async def draw() -> bytes:
        async with ollama.AsyncClient(host=server.url) as client:
            answer = await client.generate(model=MODEL, prompt="a red square")
        assert answer.image
        return base64.b64decode(answer.image)

    assert Image.open(io.BytesIO(asyncio.run(draw()))).format == "PNG"


def test_one_object_with_the_seed_among_the_options(server: Server) -> None:
    """LangChain4j and Cherry Studio: not streamed, the seed alone in `options`, the picture read as plain base64."""
    body = {"model": "sfumato-tiny", "prompt": "a cat", "stream": False, **SMALL, "options": {"seed": 42}}
    answer = server.client.post("/api/generate", json=body)
    assert answer.headers["content-type"] == "application/json"
    assert recipe(answer.json()["image"])["seed"] == 42
    missing = server.client.post("/api/generate", json=body | {"model": "x/z-image-turbo"})
    assert isinstance(missing.json()["error"], str)


def test_ruby_llm(server: Server) -> None:
    """Its provider for Ollama lists and paints by OpenAI's routes, with /v1 in the address."""
    models = server.client.get("/v1/models", headers={"authorization": "Bearer any"}).json()["data"]
    assert {"id", "created", "owned_by"} <= set(models[0])
    body = {"model": "sfumato-tiny", "prompt": "a cat", "n": 1, "size": "64x64"}
    (item,) = server.client.post("/v1/images/generations", json=body).json()["data"]
    assert httpx.get(item["url"]).headers["content-type"] == "image/png"


def test_cancelled_while_it_is_drawn(server: Server) -> None:
    body = {"model": MODEL, "prompt": "a cat", "steps": 900, "width": 512, "stream": False}
    with Held(server, body, "/api/generate") as held:
        held.drawing()
        answer = held.cancel()
    assert answer.status_code == 499
    assert isinstance(answer.json()["error"], str)


def test_a_stream_that_is_left_ends_the_work(server: Server) -> None:
    body = {"model": MODEL, "prompt": "a cat", "steps": 900, "width": 512}
    headers = {"x-request-id": "left"}
    with server.client.stream("POST", "/api/generate", json=body, headers=headers) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert json.loads(next(answer.iter_lines()))["total"] == 900
    within(60, lambda: server.client.get("/v1/images/progress/left").json()["status"] == "cancelled")


def test_an_error_after_the_first_step_is_a_line(server: Server) -> None:
    body = {"model": MODEL, "prompt": "a cat", "steps": 900, "width": 512}
    headers = {"x-request-id": "broken-off"}
    with server.client.stream("POST", "/api/generate", json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.client.delete("/v1/images/progress/broken-off")
        *_, last = lines
    assert json.loads(last) == {"error": "the request was cancelled"}


SHAPED: list[tuple[str, str, dict[str, Any], int]] = [
    ("POST", "/api/generate", {"json": {"model": "m", "prompt": "a", "steps": "many"}}, 400),
    ("POST", "/api/generate", {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
    ("POST", "/api/generate", {"content": b"a", "headers": {"content-type": "text/csv"}}, 415),
    ("POST", "/api/generate", {"json": {"prompt": "x" * 2**20}}, 413),
    ("POST", "/api/generate", {"json": {"model": "m", "prompt": "a", "images": ["?"], "stream": False}}, 400),
    ("POST", "/api/show", {"json": {"model": "no-such"}}, 404),
    ("POST", "/api/chat", {"json": {}}, 400),
    ("POST", "/api/chat", {"json": {"model": 5}}, 400),
    ("DELETE", "/api/delete", {"json": {"model": "m"}}, 400),
    ("GET", "/api/nowhere", {}, 404),
    ("GET", "/api/generate", {}, 405),
]


@pytest.mark.parametrize(("method", "path", "request_", "status"), SHAPED)
def test_every_error_has_ollamas_shape(
    tmp_path: Path, method: str, path: str, request_: dict[str, Any], status: int
) -> None:
    with Inside(tmp_path, max_body_mb=1).client() as client:
        answer = client.request(method, path, **request_)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert isinstance(answer.json()["error"], str)
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["x-request-id"]


def test_keys_and_pages_of_others(tmp_path: Path) -> None:
    with Inside(tmp_path, api_keys="someone:the-key").client() as client:
        refused = client.get("/api/tags")
        assert (refused.status_code, isinstance(refused.json()["error"], str)) == (401, True)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert client.get("/api/tags", headers={"authorization": "Bearer the-key"}).status_code == 200
        assert client.head("/api/tags").status_code == 401
    with Inside(tmp_path).client() as client:
        other = client.post("/api/generate", json={"prompt": "a"}, headers={"origin": "https://elsewhere.example"})
        assert (other.status_code, isinstance(other.json()["error"], str)) == (403, True)


def test_fields_of_text_models_are_told_unless_they_are_empty(tmp_path: Path) -> None:
    body = {"model": "m", "prompt": "a", "stream": False, "suffix": "", "raw": False, "system": "draw", "context": []}
    with Inside(tmp_path).client() as client:
        answer = client.post("/api/generate", json=body | {"options": {"seed": 1, "temperature": 0.5}})
    assert answer.headers["x-sfumato-ignored"] == "system, options.temperature"


def test_sizes(tmp_path: Path) -> None:
    """0 is what clients in Go send for a number that was not set."""
    inside = Inside(tmp_path)
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"width": 0, "height": 0}, None),
        ({"width": 64}, (64, 64)),
        ({"options": {"width": 64, "height": 128}}, (64, 128)),
        ({"width": 96, "height": 96, "options": {"width": 64}}, (96, 96)),
        ({"size": "64x96"}, (64, 96)),
    ]
    with inside.client() as client:
        for fields, size in cases:
            answer = client.post("/api/generate", json={"model": "m", "prompt": "a", "stream": False} | fields)
            assert answer.status_code == 200, answer.text
            assert inside.engine.seen[-1].sampling.size == size, fields


@pytest.mark.parametrize("blank", [None, "", []])
def test_a_blank_image_does_not_hide_images(tmp_path: Path, blank: Any) -> None:
    photo = base64.b64encode(PHOTO).decode()
    body = {"model": "m", "prompt": "a", "stream": False, "image": blank, "images": [photo]}
    inside = Inside(tmp_path)
    with inside.client() as client:
        for options in ({}, {"options": {"seed": 1}}):
            answer = client.post("/api/generate", json=body | options)
            assert answer.status_code == 200, answer.text
            assert "x-sfumato-ignored" not in answer.headers
            assert len(inside.engine.seen[-1].images) == 1
