"""What the OpenAPI document says of requests is what they are read by."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from pydantic import AliasChoices

from sfumato.api.a1111.bodies import Img2ImgBody, Txt2ImgBody
from sfumato.api.localai import InpaintingBody, UpscaleBody
from sfumato.api.ollama.bodies import GenerateBody
from sfumato.api.openai.bodies import EditsBody, GenerationsBody, VariationsBody
from sfumato.core import MAX_SEED
from support import broken_pictures
from support.inside import Inside

BODIES = {
    "/v1/images/generations": GenerationsBody,
    "/v1/images/edits": EditsBody,
    "/v1/images/variations": VariationsBody,
    "/v1/images/inpainting": InpaintingBody,
    "/v1/images/upscale": UpscaleBody,
    "/sdapi/v1/txt2img": Txt2ImgBody,
    "/sdapi/v1/img2img": Img2ImgBody,
    "/api/generate": GenerateBody,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    with Inside(tmp_path_factory.mktemp("inside")).client() as client:
        return client.get("/openapi.json").text


def schemas(text: str, path: str) -> list[dict[str, Any]]:
    content = json.loads(text)["paths"][path]["post"]["requestBody"]["content"]
    return [each["schema"] for each in content.values()]


@pytest.mark.parametrize("path", BODIES)
def test_every_name_of_a_field_is_listed(text: str, path: str) -> None:
    fields = BODIES[path].model_fields
    names = {name: {name} for name in fields}
    for name, info in fields.items():
        if isinstance(info.validation_alias, AliasChoices):
            names[name] |= {str(alias) for alias in info.validation_alias.choices}
    for schema in schemas(text, path):
        assert set(schema["properties"]) == set().union(*names.values())
        for name, aliases in names.items():
            shapes = [schema["properties"][alias] for alias in aliases]
            assert all(shape.get("anyOf") == shapes[0].get("anyOf") for shape in shapes), name
            assert all(shape["description"] for shape in shapes)


def test_a_field_that_is_required_may_have_any_of_its_names(text: str, tmp_path: Path) -> None:
    picture = "data:image/png;base64," + base64.b64encode(broken_pictures.good()["png"]).decode()
    complete = {"prompt": "a cat", "image": picture, "images": picture, "mask": picture, "scale": 2}
    with Inside(tmp_path).client() as client:
        for path in BODIES:
            for schema in schemas(text, path):
                check = jsonschema_rs.validator_for(schema)
                for names in itertools.chain.from_iterable(itertools.combinations(complete, n) for n in range(4)):
                    body = {name: complete[name] for name in names if name in schema["properties"]}
                    answer = client.post(path, json=body)
                    missing = "this field is required" in answer.text
                    assert missing != check.is_valid(body), (path, list(body), answer.text)


def test_the_names_do_what_is_said(tmp_path: Path) -> None:
    inside = Inside(tmp_path)
    with inside.client() as client:
        for steps, guidance, scheduler in (
            ("steps", "guidance_scale", "scheduler"),
            ("step", "cfg_scale", "sampler"),
            ("num_inference_steps", "cfg_scale", "scheduler_type"),
        ):
            body = {"prompt": "x", steps: 7, guidance: 3.5, scheduler: "ddim"}
            answer = client.post("/v1/images/generations", json=body)
            assert answer.status_code == 400, answer.text  # the file does not let requests choose their steps
            del body[steps]
            assert client.post("/v1/images/generations", json=body).status_code == 200
    assert {(seen.sampling.guidance_scale, seen.sampling.scheduler) for seen in inside.engine.seen} == {(3.5, "ddim")}


@pytest.mark.parametrize("path", BODIES)
def test_the_highest_seed_is_the_highest(text: str, path: str) -> None:
    assert ".0" not in text.partition('"maximum":')[2][:25]
    for schema in schemas(text, path):
        (limits,) = [each for each in schema["properties"]["seed"]["anyOf"] if each["type"] == "integer"]
        assert (limits["minimum"], limits["maximum"]) == (-1, MAX_SEED)
        assert isinstance(limits["maximum"], int)
        assert str(MAX_SEED) in schema["properties"]["seed"]["description"]


def test_the_highest_seed_is_taken_and_no_higher(tmp_path: Path) -> None:
    with Inside(tmp_path).client() as client:
        for n in (1, 3):
            for seed, status in ((MAX_SEED - n + 1, 200), (MAX_SEED - n + 2, 400)):
                answer = client.post("/v1/images/generations", json={"prompt": "x", "n": n, "seed": seed})
                assert answer.status_code == status, answer.text
                body = {"prompt": "x", "batch_size": n, "seed": seed}
                assert client.post("/sdapi/v1/txt2img", json=body).status_code == status


def test_the_page_has_it_exactly() -> None:
    page = (Path(__file__).parent.parent / "docs" / "reference" / "http.md").read_text()
    assert f"integer -1 to {MAX_SEED}" in page
    assert str(MAX_SEED + 1) not in page
