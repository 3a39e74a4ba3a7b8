"""A model of clips asked for pictures, and all such pairs: refused by its tasks, on every route, before any work."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from starlette.testclient import TestClient

from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.formats import AUDIO, IMAGE, VIDEO
from sfumato.sampling import Sampling
from sfumato.serving.catalog import Catalog
from sfumato.status import ModelInfo, ModelStatus
from support.drawing import source
from support.inside import Inside

PICTURE = base64.b64encode(source(64, 64)).decode()
CLASSES = {IMAGE: "StableDiffusionPipeline", VIDEO: "WanPipeline", AUDIO: "StableAudioPipeline"}
TASKS = {IMAGE: "text-to-image", VIDEO: "text-to-video", AUDIO: "text-to-audio"}

ROUTES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "/v1/images/generations": (IMAGE, {"prompt": "a"}),
    "/v1/images/edits": (IMAGE, {"prompt": "a", "image": PICTURE}),
    "/v1/images/variations": (IMAGE, {"image": PICTURE}),
    "/v1/images/inpainting": (IMAGE, {"prompt": "a", "image": PICTURE, "mask": PICTURE}),
    "/v1/images/upscale": (IMAGE, {"image": PICTURE, "scale": 2}),
    "/v1/chat/completions": (IMAGE, {"messages": [{"role": "user", "content": "a"}]}),
    "/api/generate": (IMAGE, {"prompt": "a"}),
    "/models/{model}": (IMAGE, {"inputs": "a"}),
    "/sdapi/v1/txt2img": (IMAGE, {"prompt": "a"}),
    "/sdapi/v1/img2img": (IMAGE, {"prompt": "a", "init_images": [PICTURE]}),
    "/sdapi/v1/options": (IMAGE, {}),
    "/v1/videos": (VIDEO, {"prompt": "a"}),
    "/v1/videos/sync": (VIDEO, {"prompt": "a"}),
    "/video": (VIDEO, {"prompt": "a"}),
    "/v1/audio/generate": (AUDIO, {"input": "a"}),
    "/v1/sound-generation": (AUDIO, {"text": "a"}),
}
"""What is made on each, and the rest of a body."""

NAMES = {"/v1/sound-generation": "model_id", "/sdapi/v1/options": "sd_model_checkpoint"}
PAIRS = [(path, kind) for path, (made, _) in ROUTES.items() for kind in CLASSES if kind != made]


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Inside:
    inside = Inside(tmp_path_factory.mktemp("kinds"))
    for kind, name in CLASSES.items():
        (inside.service.catalog._folders[0] / f"{kind}.yaml").write_text(
            f"name: {kind}\nparameters: {{model: some/one}}\n"
            f"diffusers: {{pipeline_type: {name}, enable_parameters: 'image'}}\n"
        )
    return inside


@pytest.fixture(scope="module")
def client(inside: Inside) -> Iterator[TestClient]:
    with inside.client() as client:
        yield client


def body_for(path: str, model: str) -> dict[str, Any]:
    body = dict(ROUTES[path][1])
    if path.startswith("/sdapi") and path not in NAMES:
        return body | {"override_settings": {"sd_model_checkpoint": model}}
    return body if "{" in path else body | {NAMES.get(path, "model"): model}


def refuse_all(client: TestClient, inside: Inside, path: str, kind: str) -> None:
    answer = client.post(path.format(model=kind), json=body_for(path, kind))
    assert answer.status_code in (400, 404), answer.text
    assert f"({TASKS[kind]}" in answer.text, answer.text
    assert not inside.engine.seen


@pytest.mark.parametrize(("path", "kind"), PAIRS)
def test_it_is_refused_by_its_files(client: TestClient, inside: Inside, path: str, kind: str) -> None:
    refuse_all(client, inside, path, kind)


@pytest.mark.parametrize(("path", "kind"), PAIRS)
def test_it_is_refused_when_it_is_in_memory(
    client: TestClient, inside: Inside, path: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(name: str) -> ModelStatus:
        known = static_capabilities(Catalog(inside.service.catalog._folders).get(name))
        assert known.pipeline and known.abilities
        sampling = Sampling(width=512, height=512)
        return ModelStatus("loaded", info=ModelInfo(
            known.pipeline, known.abilities, sampling, 8, 77, False, None, "cpu", "fp32"))  # fmt: skip

    monkeypatch.setattr(inside.engine, "status", loaded)
    refuse_all(client, inside, path, kind)


def test_a_tool_of_mcp_refuses_it_too(client: TestClient, inside: Inside) -> None:
    headers = {"accept": "application/json, text/event-stream"}
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "a", "version": "1"}}
    greeted = client.post("/mcp", json=call | {"method": "initialize", "params": hello}, headers=headers)
    headers["mcp-session-id"] = greeted.headers["mcp-session-id"]
    for kind in (VIDEO, AUDIO):
        for tool, more in (("generate_image", {}), ("edit_image", {"image": PICTURE})):
            params = {"name": tool, "arguments": {"prompt": "a", "model": kind} | more}
            answer = client.post("/mcp", json=call | {"params": params}, headers=headers)
            (told,) = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            assert told["result"]["isError"] and f"({TASKS[kind]}" in answer.text, answer.text
    assert not inside.engine.seen
