"""A model with a prior that makes embeddings of pictures for it: FLUX.1 Redux over a FLUX.1 model."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPriorReduxPipeline
from PIL import Image
from starlette.testclient import TestClient

from sfumato.api.app import create_app
from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.commands.check import check
from sfumato.drawing.info import model_info
from sfumato.engine.local import Local
from sfumato.errors import LoadError, ModelFileError, SfumatoError
from sfumato.models import inspection, load
from sfumato.pictures.stores import store_of
from sfumato.serving.catalog import Catalog
from sfumato.serving.service import Service
from sfumato.settings import Settings
from support import redux, tiny
from support.families_served import encoded
from support.here import config, cut, drawn, quiet, use
from support.hub import Hub

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of toy sizes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save(tiny.flux(), folder / "base")
    tiny.save(redux.redux(), folder / "redux")
    text = "name: m\nparameters: {model: base}\ncuda: false\ndtype: fp32\nstep: 2\ndiffusers: {prior: redux}\n"
    (folder / "m.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def client(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = Settings(models=models, data=tmp_path_factory.mktemp("data"), device="cpu")
    service = Service(Catalog([models]), Local(settings), settings)
    with TestClient(create_app(service, store_of(settings))) as client:
        yield client


def picture(seed: int) -> Image.Image:
    """Of one colour."""
    return Image.new("RGB", (64, 64), tuple(np.random.default_rng(seed).integers(0, 255, 3).tolist()))


def plain(models: Path, pictures: list[Image.Image], prompt: str, **changes: Any) -> Any:
    """diffusers' own two pipelines, one after the other."""
    base = DiffusionPipeline.from_pretrained(models / "base")
    lent = {name: getattr(base, name) for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
    prior = FluxPriorReduxPipeline.from_pretrained(models / "redux", **lent)
    embeddings = prior(pictures if len(pictures) > 1 else pictures[0], prompt=prompt)
    base.register_modules(text_encoder=None, text_encoder_2=None)
    asked = {"num_inference_steps": 2, "width": 64, "height": 64, "generator": torch.Generator().manual_seed(1)}
    return np.asarray(base(**embeddings, **{**asked, **changes}).images[0]).astype(int)


def test_over_http_it_draws_what_diffusers_draws_in_two_calls(client: TestClient, models: Path) -> None:
    def edited(*seeds: int, **fields: Any) -> Any:
        body = {"model": "m", "image": [encoded(picture(seed)) for seed in seeds], "seed": 1, "size": "64x64", **fields}
        answer = client.post("/v1/images/edits", json=body)
        assert answer.status_code == 200, answer.text
        data = base64.b64decode(answer.json()["data"][0]["b64_json"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)

    one = edited(1, prompt="a cat")
    assert np.abs(one - plain(models, [picture(1)], "a cat")).max() <= 1
    assert np.abs(one - edited(2, prompt="a cat")).max() > 1
    assert np.abs(one - edited(1, prompt="a dog")).max() > 1
    several = edited(1, 2, prompt="a cat")
    assert np.abs(several - plain(models, [picture(1), picture(2)], "a cat")).max() <= 1
    stronger = edited(1, prompt="a cat", guidance_scale=9)
    assert np.abs(stronger - plain(models, [picture(1)], "a cat", guidance_scale=9.0)).max() <= 1
    refused = client.post("/v1/images/generations", json={"model": "m", "prompt": "a cat"})
    assert refused.status_code == 400
    assert "needs a source picture" in refused.json()["error"]["message"]


def test_the_list_says_the_same_before_and_after_it_is_loaded(models: Path) -> None:
    made = Catalog([models]).get("m")
    before, after = static_capabilities(made), model_info(load.load(made, "cpu", quiet))
    assert (
        (before.pipeline, before.tasks)
        == (after.pipeline, after.abilities.tasks)
        == ("FluxPipelineWithPrior", ("image-to-image",))
    )
    assert before.abilities
    assert before.abilities == after.abilities


def test_what_does_not_fit_is_refused_by_name(models: Path, tmp_path: Path) -> None:
    for model, prior, words in (
        (
            models / "base",
            models / "base",
            "is a FluxPipeline, which makes no embeddings of pictures that FluxPipeline",
        ),
        (models / "base", tmp_path, "prior: .* has no model_index.json"),
    ):
        made = config(models, model, prior=str(prior))
        with pytest.raises(SfumatoError, match=words) as caught:
            load.load(made, "cpu", quiet)
        assert caught.value.param == "diffusers.prior"
    with pytest.raises(ModelFileError, match="FluxImg2ImgPipeline does not draw from a prompt alone"):
        inspection.choose(config(models, "base", prior="redux", pipeline_type="FluxImg2ImgPipeline"), {})


def test_it_is_fetched_from_a_hub_once(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as hub:
        hub.add("tiny/base", models / "base")
        hub.add("tiny/redux", models / "redux")
        use(hub, tmp_path / "cache", monkeypatch)
        made = config(tmp_path, "tiny/base", prior="tiny/redux")
        asked = {"images": (encoded_png(picture(1)),), "guidance_scale": 3.5}
        first = drawn(made, **asked)
        (tmp_path / "m.yaml").write_text("name: m\nparameters: {model: tiny/base}\ndiffusers: {prior: tiny/redux}\n")
        (report,) = check(Catalog([tmp_path]), ask=True)
        assert report.ok, report
        missing = config(tmp_path, "tiny/base", prior="tiny/absent")
        with pytest.raises(LoadError, match="tiny/absent is not on"):
            load.load(missing, "cpu", quiet)
    cut(monkeypatch)
    assert np.array_equal(drawn(made, **asked), first)


def encoded_png(image: Image.Image) -> bytes:
    return base64.b64decode(encoded(image))
