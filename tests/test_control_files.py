"""ControlNets of a model file, one or a list of them, and pictures that are made again under their controls."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.commands import kept_sources
from sfumato.commands.check import check
from sfumato.commands.generate import generate
from sfumato.core import Control, Recipe, RecordedControl
from sfumato.errors import InvalidRequest
from sfumato.models import load
from sfumato.pictures import images, recipe
from sfumato.sampling import Sampling
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings
from support import families, tiny
from support.drawing import quiet, source
from support.gallery import MADE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model file whose ControlNets are a list, and no word of the class."""
    root = tmp_path_factory.mktemp("controls")
    tiny.save(tiny.stable_diffusion(), root / "base")
    for seed in (4, 5):
        with tiny.seeded(seed):
            families.lively(families.control_net()).save_pretrained(root / f"net{seed}")
    (root / "two.yaml").write_text(
        "parameters: {model: base}\ndtype: fp32\nsize: 64x64\ndiffusers: {control_net: [net4, net5]}\n"
    )
    return root


def test_a_list_of_control_nets_is_loaded_in_its_order_by_the_class_that_takes_it(models: Path) -> None:
    catalog = Catalog([models])
    (report,) = check(catalog)
    assert report.ok, str(report)
    config = catalog.get("two")
    assert static_capabilities(config).pipeline == "StableDiffusionControlNetPipeline"
    pipeline = load.load(config, "cpu", quiet).pipeline
    assert type(pipeline).__name__ == "StableDiffusionControlNetPipeline"
    kept = [net.controlnet_cond_embedding.conv_in.weight.detach().numpy() for net in pipeline.controlnet.nets]
    for seed, weight in zip((4, 5), kept, strict=True):
        with tiny.seeded(seed):
            made = families.lively(families.control_net())
        assert np.allclose(weight, made.controlnet_cond_embedding.conv_in.weight.detach().numpy())


def test_a_picture_is_made_again_under_the_same_controls(models: Path, tmp_path: Path) -> None:
    settings = Settings(models=models, data=tmp_path / "data", device="cpu")
    one, two = source(64, 64), source(64, 32)
    first = {"prompts": ["a cat"], "model": "two", "seed": 7, "sampling": Sampling(steps=2)}

    def made(controls: list[Control], like: Path | None, **fields: Any) -> Image.Image:
        (path,) = generate({**fields, "controls": controls}, like, tmp_path / f"{len(controls)}.png", settings)
        with Image.open(path) as image:
            image.load()
        return image

    original = made([Control(one, weight=0.5), Control(two, end=0.5)], None, **first)
    like = (tmp_path / "2.png").rename(tmp_path / "like.png")
    assert [(each.weight, each.end) for each in recipe.read(like).controls] == [(0.5, None), (None, 0.5)]
    again = made([Control(one), Control(two)], like)  # weights and ends come from the recipe
    assert again.tobytes() == original.tobytes()
    unweighted = made([Control(one), Control(two)], None, **first)
    assert unweighted.tobytes() != original.tobytes()
    with pytest.raises(InvalidRequest, match="--control: not the picture"):
        made([Control(two), Control(one)], like)
    with pytest.raises(InvalidRequest, match="made from 2 such pictures, but 1"):
        made([Control(one)], like)


NAMED = RecordedControl(images.fingerprint(source(64, 64)), weight=0.5, end=0.5, name="sd/canny", preprocess="canny")
OTHER = RecordedControl(images.fingerprint(source(64, 32)), name="sd/depth")
BOUNDS = images.Bounds.of(Settings())


def made_with(*controls: RecordedControl) -> Recipe:
    return replace(MADE, controls=controls)


def test_control_pictures_of_a_recipe_are_found_beside_it_and_in_the_store(tmp_path: Path) -> None:
    beside, stored = tmp_path / "beside", tmp_path / "stored"
    for folder in (beside, stored):
        folder.mkdir()
    Image.open(io.BytesIO(source(64, 64))).save(beside / "edges.bmp")  # another file, the same pixels
    (beside / "no picture.png").write_bytes(b"x")
    (beside / "other.png").write_bytes(source(32, 32))
    (stored / "depth.png").write_bytes(source(64, 32))
    found = kept_sources.controls([], made_with(NAMED, OTHER), [beside, stored], BOUNDS)
    assert [(each.name, each.weight, each.end, each.preprocess) for each in found] == [
        ("sd/canny", 0.5, 0.5, "canny"), ("sd/depth", None, None, None)
    ]  # fmt: skip
    assert [each.image for each in found] == [(beside / "edges.bmp").read_bytes(), source(64, 32)]
    (stored / "depth.png").unlink()
    with pytest.raises(InvalidRequest) as refused:
        kept_sources.controls([], made_with(NAMED, OTHER), [beside, stored], BOUNDS)
    for said in (OTHER.image_sha256, str(beside), str(stored), "--control sd/canny=FILE --control sd/depth=FILE"):
        assert said in refused.value.message
    assert NAMED.image_sha256 not in refused.value.message


def test_control_pictures_with_names_may_be_passed_in_any_order(tmp_path: Path) -> None:
    for name, picture in (("a=b.png", source(64, 64)), ("depth.png", source(64, 32))):
        (tmp_path / name).write_bytes(picture)
    given = [
        kept_sources.passed(text)
        for text in (
            f"sd/depth={tmp_path / 'depth.png'}",
            f"sd/canny={tmp_path / 'a=b.png'}",
            str(tmp_path / "a=b.png"),
        )
    ]
    assert [each.name for each in given] == ["sd/depth", "sd/canny", None]
    ordered = kept_sources.controls(given[:2], made_with(NAMED, OTHER), [], BOUNDS)
    assert [(each.name, each.image) for each in ordered] == [("sd/canny", source(64, 64)), ("sd/depth", source(64, 32))]
    with pytest.raises(InvalidRequest, match="there is none for sd/canny"):
        kept_sources.controls([given[0], given[0]], made_with(NAMED, OTHER), [], BOUNDS)
    with pytest.raises(InvalidRequest, match=r"there is no file 'nowhere\.png'"):
        kept_sources.passed("sd/canny=nowhere.png")
