"""`preprocess: depth`: the map that transformers itself estimates, with a model that is loaded like a ControlNet."""

from __future__ import annotations

import base64
import functools
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from sfumato.config import ModelConfig
from sfumato.core import Control
from sfumato.drawing import preprocessors
from sfumato.errors import DrawError
from sfumato.models import estimators
from support import estimators as tiny_ones
from support import nets
from support.answers import error_of, image_of
from support.families import picture
from support.families_served import Served, encoded, served

WIDE = Image.fromarray(np.asarray(Image.radial_gradient("L").resize((96, 64)).convert("RGB")) // 3 + 40)
REPO = "tiny/depth"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("depth")
    with served(folder, nets.families(), depth_model="depth-here") as server:
        tiny_ones.save_net(server.folder)
        for name, kind in (("depth-here", "depth anything"), ("dpt", "dpt"), ("metric", "metric")):
            tiny_ones.save_depth(server.folder / name, kind)
        yield server


@functools.cache
def of_transformers(folder: Path) -> Any:
    return transformers.pipeline("depth-estimation", model=str(folder))


def estimated(folder: Path, image: Image.Image) -> Image.Image:
    made: Image.Image = of_transformers(folder)(image)["depth"]
    return made.convert("RGB")


def drawn(server: Served, model: str = "", **control: Any) -> Any:
    fields = {"step": 4, "size": "64x64", "guidance_scale": 5.0}
    return server.generate(model or server.model("sd"), controls=[{"name": "strong", "weight": 1, **control}], **fields)


def array(answer: Any) -> np.ndarray[Any, Any]:
    return np.asarray(image_of(answer).convert("RGB")).astype(int)


def with_key(server: Served, name: str, depth_model: str) -> str:
    """A model file with the key."""
    file = json.loads((server.folder / f"{server.model('sd')}.yaml").read_text())
    file |= {"name": name, "diffusers": {**file["diffusers"], "depth_model": depth_model}}
    (server.folder / f"{name}.yaml").write_text(json.dumps(file))
    server.built[name] = server.built["sd"]
    return name


# What it draws.


@pytest.mark.parametrize(("folder", "model"), [("depth-here", ""), ("dpt", "with-dpt"), ("metric", "with-metric")])
def test_it_draws_what_transformers_estimates_at_the_drawn_size(server: Served, folder: str, model: str) -> None:
    fitted = ImageOps.fit(WIDE, (64, 64), Image.Resampling.LANCZOS)
    depth = estimated(server.folder / folder, fitted)
    assert np.asarray(depth).std() > 20
    if folder == "metric":  # its numbers are distances; ControlNets were trained with the nearest in white
        depth = ImageOps.invert(depth)
    name = with_key(server, model, folder) if model else ""
    answer = drawn(server, name, image=encoded(WIDE), preprocess="depth")
    prepared = drawn(server, name, image=encoded(depth))
    assert np.abs(array(answer) - array(prepared)).max() <= 1
    assert np.abs(array(answer) - array(drawn(server, name, image=encoded(fitted)))).max() > 1


@pytest.mark.parametrize("kind", [*tiny_ones.DEPTH])
def test_a_map_is_that_of_transformers(tmp_path: Path, kind: str) -> None:
    folder = tiny_ones.save_depth(tmp_path / "model", kind)
    for image in (WIDE, picture(1), picture(2).resize((40, 88))):
        made = np.asarray(preprocessors._depth(image, Control(b""), [loaded(folder)])).astype(int)
        expected = np.asarray(estimated(folder, image)).astype(int)
        expected = 255 - expected if kind == "metric" else expected
        assert np.abs(made - expected).max() <= 1


def test_a_picture_that_is_flat_everywhere_makes_a_black_map(tmp_path: Path) -> None:
    estimator = loaded(tiny_ones.save_depth(tmp_path / "model"))
    with torch.no_grad():
        for parameter in estimator.module.head.parameters():
            parameter.zero_()
        assert not np.asarray(preprocessors._depth(WIDE, Control(b""), [estimator])).any()
        estimator.module.head.conv3.bias.fill_(torch.nan)
        estimator.module.head.max_depth = torch.nan
        with pytest.raises(DrawError, match="no finite numbers"):
            preprocessors._depth(WIDE, Control(b""), [estimator])


def loaded(folder: Path) -> Any:
    config = ModelConfig(name="x", part="depth_model", model=str(folder), folder=folder, cuda=False, dtype="fp32")
    return estimators.load(config, "cpu", lambda status: None, lambda needs: None).pipeline


# AUTOMATIC1111's route.


@pytest.mark.parametrize(
    "module", ["depth", "depth_midas", "depth_anything", "depth_anything_v2", "Depth_LeReS++", "depth_zoe", "depth_new"]
)
def test_modules_of_automatic1111_that_begin_with_depth(server: Served, module: str) -> None:
    answer = by_webui(server, module=module, image=encoded(WIDE))
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).convert("RGB")
    assert np.array_equal(np.asarray(image).astype(int), array(drawn(server, image=encoded(WIDE), preprocess="depth")))
    info = json.loads(answer.json()["info"])
    assert "Module: depth, Model: strong [" in info["infotexts"][0]
    assert not info.get("warnings")


def by_webui(server: Served, **unit: Any) -> Any:
    body = {"prompt": "a cat", "seed": 1, "steps": 4, "width": 64, "height": 64, "cfg_scale": 5.0}
    body |= {"override_settings": {"sd_model_checkpoint": server.model("sd")}}
    body |= {"alwayson_scripts": {"controlnet": {"args": [{"model": "strong", "weight": 1, **unit}]}}}
    return server.client.post("/sdapi/v1/txt2img", json=body)


def test_the_list_of_modules_has_them_and_what_there_is_not_is_refused(server: Served) -> None:
    told = server.client.get("/controlnet/module_list").json()
    assert {"depth", "depth_midas", "depth_anything_v2"} <= set(told["module_list"])
    assert told["module_detail"]["depth"]["model_free"] is False
    assert told["module_detail"]["canny"]["model_free"] is True
    refused = by_webui(server, module="depth_hand_refiner", image=encoded(WIDE))
    assert "'depth_hand_refiner' is not there" in error_of(refused)["message"]


# What goes wrong.


def spoilt(server: Served) -> dict[str, str]:
    """Names of models that estimate no depth, by what is wrong."""
    folder = server.folder
    shutil.copytree(folder / "controlnets" / "strong", folder / "net", dirs_exist_ok=True)
    for name in ("damaged", "half", "pickled", "other"):
        shutil.copytree(folder / "depth-here", folder / name, dirs_exist_ok=True)
    (folder / "damaged" / "model.safetensors").write_bytes(b"no tensors")
    tensors = load_file(folder / "half" / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if "head" not in name}, folder / "half/model.safetensors")
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps({**config, "model_type": "vit", "architectures": None}))
    return {"a ControlNet": "net", "damaged": "damaged", "half": "half", "pickled": "pickled", "other": "other"}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("a ControlNet", "cannot be loaded"),
        ("damaged", "cannot be loaded"),
        ("half", "lacks head."),
        ("pickled", "no file named model.safetensors"),
        ("other", "cannot be loaded"),
        ("/nowhere/at/all", "neither a folder that is there nor a hub id"),
        ("depth", "neither a folder that is there nor a hub id"),
    ],
)
def test_a_model_that_estimates_no_depth_is_refused_with_the_field(server: Served, what: str, says: str) -> None:
    name = with_key(server, f"spoilt-{abs(hash(what))}", spoilt(server).get(what, what))
    error = error_of(drawn(server, name, image=encoded(WIDE), preprocess="depth"))
    assert (error["param"], says in error["message"]) == ("controls[0].preprocess", True), error
    assert "depth_model" in error["message"]
    assert drawn(server, name, image=encoded(WIDE)).status_code == 200
