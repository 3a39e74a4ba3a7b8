"""The list of models as clients filter it: OpenRouter's modalities and LocalAI's capabilities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from support.inside import Inside

FILES = {
    "drawer": ("StableDiffusionPipeline", "diffusers: {enable_parameters: image}\n"),
    "closed": ("StableDiffusionPipeline", "diffusers: {enable_parameters: num_inference_steps}\n"),
    "labels": ("DiTPipeline", ""),
    "music": ("AudioLDMPipeline", ""),
    "upscaler": ("StableDiffusionUpscalePipeline", "diffusers: {enable_parameters: image}\n"),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("list")
    inside = Inside(folder)
    for name, (cls, more) in FILES.items():
        (folder / "models" / name).mkdir()
        (folder / "models" / name / "model_index.json").write_text(json.dumps({"_class_name": cls}))
        (folder / "models" / f"{name}.yaml").write_text(f"name: {name}\nparameters: {{model: {name}}}\n{more}")
    with inside.client() as client:
        yield client


def listed(client: TestClient, path: str) -> dict[str, dict[str, Any]]:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return {each["id"]: each for each in answer.json()["data"]}


def test_modalities(client: TestClient) -> None:
    found = {name: each["architecture"] for name, each in listed(client, "/v1/models").items()}
    both, text = ["text", "image"], ["text"]
    assert found == {
        "m": {"input_modalities": text, "output_modalities": ["image"]},  # not on this disk
        "drawer": {"input_modalities": both, "output_modalities": ["image"]},
        "closed": {"input_modalities": text, "output_modalities": ["image"]},
        "labels": {"input_modalities": text, "output_modalities": ["image"]},
        "music": {"input_modalities": text, "output_modalities": ["audio"]},
        "upscaler": {"input_modalities": both, "output_modalities": ["image"]},
    }
    assert client.get("/v1/models/drawer").json()["architecture"] == found["drawer"]


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
def test_the_filter(client: TestClient, path: str) -> None:
    pictures = {"m", "drawer", "closed", "labels", "upscaler"}
    for query, names in (
        ("?output_modalities=image", pictures),
        ("?output_modalities=Image,", pictures),
        ("?output_modalities=text", set()),
        ("?output_modalities=audio", {"music"}),
        ("?output_modalities=text,image", set()),
        ("?output_modalities=all", pictures | {"music"}),
        ("?output_modalities=", pictures | {"music"}),
        ("", pictures | {"music"}),
    ):
        assert set(listed(client, path + query)) == names, query


@pytest.mark.parametrize("path", ["/v1/models/capabilities", "/models/capabilities"])
def test_localais_capabilities(client: TestClient, path: str) -> None:
    found = listed(client, path)
    assert {name: each["capabilities"] for name, each in found.items()} == {
        "m": ["image"], "drawer": ["image"], "closed": ["image"], "labels": ["image"], "music": ["sound_generation"],
        "upscaler": ["upscale"],
    }  # fmt: skip
    assert found["drawer"] == {
        "id": "drawer",
        "object": "model",
        "capabilities": ["image"],
        "input_modalities": ["text", "image"],
        "output_modalities": ["image"],
    }
    assert client.get(path).json()["object"] == "list"


def test_localais_flags(client: TestClient) -> None:
    """As its page reads them, and clients that were written after it."""
    found = listed(client, "/api/models/capabilities")
    assert [name for name, each in found.items() if "FLAG_IMAGE" in each["capabilities"]] == [
        "closed", "drawer", "labels", "m",
    ]  # fmt: skip
    assert found["upscaler"] == {"id": "upscaler", "capabilities": ["FLAG_UPSCALE"], "backend": "diffusers"}


def test_the_list_needs_a_key(tmp_path: Path) -> None:
    inside = Inside(tmp_path, api_keys="anna:key-a")
    with inside.client() as client:
        for path in ("/v1/models/capabilities", "/api/models/capabilities"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer key-a"}).status_code == 200
