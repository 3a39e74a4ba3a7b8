"""Several reference pictures for one edit: what diffusers draws with the list, or refused where a class takes one."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from sfumato.commands import generate as command
from sfumato.config import ModelConfig
from sfumato.core import Done
from sfumato.drawing.draw import draw
from sfumato.errors import InvalidRequest
from sfumato.pictures import images, recipe
from sfumato.pipelines.modular import adapted
from sfumato.settings import Settings
from support import families_transformers, modular
from support.answers import error_of, image_of
from support.drawing import loaded, quiet, wanted
from support.families import FLOW, Family, picture
from support.families_served import Served, encoded, served
from support.tiny import WIDTH, seeded

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some about toy sizes

PICTURE, OTHER = picture(1), picture(2)
LAYERS = 31
"""Of a text encoder of which the class reads the 10th, 20th and 30th."""


def flux2() -> Any:
    parts = families_transformers.flux2().components
    text = {**parts["text_encoder"].config.text_config.to_dict(), "num_hidden_layers": LAYERS, "layer_types": None}
    vision = parts["text_encoder"].config.vision_config.to_dict()
    shape = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    with seeded(3):
        config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=1)
        parts["text_encoder"] = Mistral3ForConditionalGeneration(config).eval()
        transformer = d.Flux2Transformer2DModel(**{**shape, "joint_attention_dim": 3 * WIDTH}).eval()
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
        parts["transformer"] = transformer
    return d.Flux2Pipeline(**parts)


FAMILIES = {
    "flux2": Family(flux2, FLOW),
    "kontext": families_transformers.FAMILIES["FluxKontext"],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("references"), FAMILIES) as server:
        yield server


def png(image: Any) -> bytes:
    return base64.b64decode(encoded(image))


def array(answer: Any) -> np.ndarray[Any, Any]:
    return np.asarray(image_of(answer).convert("RGB")).astype(int)


@pytest.mark.parametrize("spelling", ["image[]", "image", "json image", "json images"])
def test_two_pictures_are_the_list_that_diffusers_takes(server: Served, spelling: str) -> None:
    model = server.model("flux2")
    fields = {"model": model, "prompt": "a cat", "seed": 1, "size": "64x64", "response_format": "b64_json"}
    if spelling.startswith("json"):
        name = spelling.partition(" ")[2]
        pictures: Any = [encoded(PICTURE), encoded(OTHER)]
        if name == "images":
            pictures = [{"image_url": f"data:image/png;base64,{each}"} for each in pictures]
        answer = server.client.post("/v1/images/edits", json={**fields, name: pictures})
    else:
        files = [(spelling, ("a.png", png(PICTURE), "image/png")), (spelling, ("b.png", png(OTHER), "image/png"))]
        answer = server.client.post("/v1/images/edits", data={k: str(v) for k, v in fields.items()}, files=files)
    pipeline = flux2()
    pipeline.set_progress_bar_config(disable=True)

    def of_diffusers(pictures: list[Any]) -> np.ndarray[Any, Any]:
        call = {"prompt": "a cat", "num_inference_steps": 2, "width": 64, "height": 64, "image": pictures}
        image = pipeline(generator=torch.Generator().manual_seed(1), **call).images[0]
        return np.asarray(image).astype(int)

    assert np.abs(array(answer) - of_diffusers([PICTURE, OTHER])).max() <= 1
    assert np.abs(array(answer) - of_diffusers([PICTURE])).max() > 1


def test_a_class_that_takes_one_picture_refuses_two(server: Served) -> None:
    model = server.model("kontext")
    (taken,) = [each for each in server.told(model)["inputs"] if each["name"] == "image"]
    assert taken["most"] == 1
    assert server.edit(model, image=[encoded(PICTURE)]).status_code == 200
    error = error_of(server.edit(model, image=[encoded(PICTURE), encoded(OTHER)]))
    assert error["param"] == "image"
    assert "takes one picture, got 2" in error["message"]
    files = [("image[]", ("a.png", png(PICTURE), "image/png")), ("image[]", ("b.png", png(OTHER), "image/png"))]
    answer = server.client.post("/v1/images/edits", data={"model": model, "prompt": "a cat"}, files=files)
    assert error_of(answer)["param"] == "image"


@pytest.mark.parametrize(("family", "most"), [("FluxKontext", 1), ("Flux2", None), ("Flux2Klein", None)])
def test_a_class_made_of_blocks_takes_as_many_as_it_draws_from(
    family: str, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = adapted(modular.BUILD[family]())
    monkeypatch.setattr(ModelConfig, "options", {"text_encoder_out_layers": (1,)} if most is None else {})
    model = loaded(pipeline)
    fields = {"prompt": "a cat", "width": 64, "height": 64, "images": (png(PICTURE), png(OTHER))}
    if most:
        with pytest.raises(InvalidRequest, match="takes one picture, got 2"):
            draw(model, wanted(**fields), quiet)
        return
    both = draw(model, wanted(**fields), quiet)
    assert len(both.recipe.image_sha256) == 2
    assert both.file != draw(model, wanted(**{**fields, "images": fields["images"][:1]}), quiet).file


def test_a_picture_is_made_again_from_the_same_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(flux2())
    fields: dict[str, Any] = {"prompt": "a cat", "width": 64, "height": 64}
    first = draw(model, wanted(**fields, images=(png(PICTURE), png(OTHER))), quiet)
    assert first.recipe.image_sha256 == tuple(images.fingerprint(png(each)) for each in (PICTURE, OTHER))
    (tmp_path / "like.png").write_bytes(first.file)
    told = recipe.read(tmp_path / "like.png")
    sent: list[Any] = []

    async def drawn(request: Any, settings: Settings) -> list[Done]:
        sent.append(request)
        again = wanted(prompt=request.prompts[0], images=tuple(request.images), seed=request.seed)
        return [draw(model, replace(again, sampling=request.sampling), quiet)]

    monkeypatch.setattr(command, "_draw", drawn)
    settings = Settings(models=tmp_path, data=tmp_path / "data", device="cpu")
    like, output = tmp_path / "like.png", tmp_path / "again.png"
    pictures = [png(PICTURE), png(OTHER)]
    (path,) = command.generate({"images": pictures}, like, output, settings)
    assert np.array_equal(np.asarray(images.decoded(path.read_bytes())), np.asarray(images.decoded(first.file)))
    assert recipe.read(path).image_sha256 == told.image_sha256
    with pytest.raises(InvalidRequest, match="--image: not the picture"):
        command.generate({"images": pictures[::-1]}, like, None, settings)
    with pytest.raises(InvalidRequest, match="made from 2 such pictures, but 1"):
        command.generate({"images": pictures[:1]}, like, None, settings)
