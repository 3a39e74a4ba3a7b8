"""Estimators of depth in the engine: shared, within the budget, fetched from a hub, and in the recipe."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import sfumato.commands.generate as command
from sfumato.core import Control, Done, Generation
from sfumato.errors import InvalidRequest
from sfumato.pictures import recipe
from sfumato.settings import Settings
from support import control_engine, prompted
from support import estimators as tiny_ones
from support.drawing import source
from support.engines import Engine, generation, pixels
from support.families_served import encoded
from support.hub import Hub

REPO = "tiny/depth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model, ControlNets, an IP-Adapter, and what estimates depth."""
    folder = control_engine.save(tmp_path_factory.mktemp("models"))
    tiny_ones.save_depth(folder / "depth-here")
    tiny_ones.save_net(folder)
    return folder


def requested(id: str, size: int = 64, name: str = "strong", **fields: Any) -> Generation:
    return generation(id, controls=(Control(source(size, 64), name=name, preprocess="depth"),), **fields)


def test_requests_share_one_estimator_and_its_forward_passes(folder: Path) -> None:
    engine = Engine(folder, max_batch=16, depth_model="depth-here")
    engine.draw(requested("first"))  # then nothing waits for a load
    wanted = [requested(f"{n}", size=64 + 8 * n) for n in range(3)]
    engine.draw(*wanted)  # proves that its rows are independent
    events = engine.draw(*wanted)
    assert engine.shared("depth_model") == 3
    for each in wanted:
        alone = Engine(folder, max_batch=1, depth_model="depth-here").draw(each)[each.id]
        assert np.abs(pixels(alone) - pixels(events[each.id])).max() <= 1
    assert engine.in_memory == {"m", "controlnets/strong", f"depth_model {(folder / 'depth-here').resolve()}"}
    assert not any(engine.loop._pool._users.values())
    assert (len(engine.loop._pool), engine.loop._pool.loads) == (1, 1)


def test_it_counts_within_the_budget_and_leaves_when_it_is_idle(folder: Path) -> None:
    sizes = Engine(folder, depth_model="depth-here")
    sizes.draw(requested("1"))
    sizes_of = sizes.loop._pool.sizes
    of_estimator = next(size for name, size in sizes_of.items() if name.startswith("depth_model"))
    tensors = load_file(folder / "depth-here" / "model.safetensors").values()
    assert of_estimator >= sum(tensor.nbytes for tensor in tensors)
    engine = Engine(folder, depth_model="depth-here")
    engine.loop._pool._budget.size = sum(sizes_of.values()) - of_estimator // 2
    events = engine.draw(requested("1"), generation("2"))
    refused = events["1"].error
    assert (refused.status, refused.retry, refused.param) == (507, False, "controls[0].preprocess")
    assert isinstance(events["2"], Done)
    engine.loop._pool._budget.size = sum(sizes_of.values()) + of_estimator // 2
    assert isinstance(engine.draw(requested("3"))["3"], Done)
    engine.loop._pool.unload(None)
    assert engine.in_memory == set()


def test_a_request_that_is_cancelled_lets_it_go(folder: Path) -> None:
    engine = Engine(folder, depth_model="depth-here")
    engine.cancel_at_its_first_step("1")
    assert not isinstance(engine.draw(requested("1"))["1"], Done)
    assert not any(engine.loop._pool._users.values())


def test_one_of_a_hub_is_fetched_once_and_then_serves_offline(
    folder: Path, here: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(folder / "depth-here", tmp_path / "repo")
    (tmp_path / "repo" / "pytorch_model.bin").write_bytes(b"a pickle")
    here.add(REPO, tmp_path / "repo")
    local = Engine(folder, depth_model="depth-here").draw(requested("1"))["1"]
    event = Engine(folder, depth_model=REPO).draw(requested("1"))["1"]
    assert np.array_equal(pixels(event), pixels(local))
    assert set(here.downloads(REPO)) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    before = here.downloads(REPO)
    assert isinstance(Engine(folder, depth_model=f"hf://{REPO}@main").draw(requested("1"))["1"], Done)
    assert here.downloads(REPO) == before
    missing = Engine(folder, depth_model="tiny/other").draw(requested("1"))["1"].error
    assert (missing.status, missing.param) == (400, "controls[0].preprocess")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert isinstance(Engine(folder, depth_model=REPO).draw(requested("1"))["1"], Done)
    unreached = Engine(folder, depth_model="tiny/other").draw(requested("1"))["1"].error
    assert (unreached.status, unreached.param) == (503, "controls[0].preprocess")


def test_a_folder_that_is_written_over_is_read_again(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "depth-here", tmp_path / "mine")
    engine = Engine(folder, depth_model=str(tmp_path / "mine"))
    before = pixels(engine.draw(requested("1"))["1"])
    assert np.array_equal(pixels(engine.draw(requested("1"))["1"]), before)
    tiny_ones.save_depth(tmp_path / "mine", seed=4)
    assert not np.array_equal(pixels(engine.draw(requested("1"))["1"]), before)


def test_without_a_model_depth_is_refused_with_the_remedy(folder: Path) -> None:
    error = Engine(folder, depth_model="").draw(requested("1"))["1"].error
    assert (error.status, error.param) == (400, "controls[0].preprocess")
    assert "depth_model is empty; set it to a depth estimator, such as depth-anything/" in error.message


def test_errors_name_the_control_behind_those_of_an_adapter_with_several_pictures(folder: Path) -> None:
    """Pictures of one adapter are one control; those of adapters are not among the ControlNets'."""
    prompted.save_encoder(folder / "ip_adapters" / "image_encoder")
    engine = Engine(folder, depth_model="tiny")
    model = engine.draw(generation("0"))
    assert isinstance(model["0"], Done)
    unet = engine.loop._pool._loaded["m"].pipeline.unet
    prompted.save_adapter(folder / "ip_adapters" / "plus.safetensors", unet, "plus")
    picture = source(64, 64)
    adapter = Control(picture, name="plus"), Control(picture, joins=True)
    for preprocess in ("depth", "pose"):
        followed = Control(picture, name="strong", preprocess=preprocess, estimators=("tiny", "tiny"))
        error = engine.draw(generation("1", controls=(*adapter, followed)))["1"].error
        assert (error.status, error.param) == (400, "controls[1].preprocess"), error.message


def test_canny_without_opencv_names_the_control_behind_an_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    picture = source(64, 64)
    adapter = Control(picture, name="plus"), Control(picture, joins=True)
    made = generation("1", controls=(*adapter, Control(picture, name="strong", preprocess="canny")))
    error = Engine(folder).draw(made)["1"].error
    assert (error.param, "sfumato[preprocess]" in error.message) == ("controls[1].preprocess", True)


def test_an_adapter_takes_no_depth_and_loads_nothing_for_it(folder: Path) -> None:
    engine = Engine(folder, depth_model="depth-here")
    error = engine.draw(requested("1", name="plus"))["1"].error
    assert isinstance(error, InvalidRequest)
    assert error.param == "controls[0].preprocess"
    assert not any(name.startswith("depth_model") for name in engine.in_memory)


def test_the_recipe_has_the_model_and_generate_like_draws_with_it(folder: Path, tmp_path: Path) -> None:
    settings = Settings(models=folder, data=tmp_path, device="cpu", depth_model="depth-here")
    file = {"name": "sd", "parameters": {"model": "base"}, "cuda": False, "dtype": "fp32"}
    (folder / "sd.yaml").write_text(json.dumps(file))
    shaded = np.asarray(Image.radial_gradient("L").resize((96, 64)).convert("RGB")) // 3 + 40
    png = base64.b64decode(encoded(Image.fromarray(shaded)))
    fields = {"prompts": ["a cat"], "model": "sd", "seed": 7, "size": "64x64"}
    control = Control(png, name="strong", preprocess="depth")
    (made,) = command.generate({**fields, "controls": [control]}, None, tmp_path / "made.png", settings)
    digest = hashlib.sha256((folder / "depth-here" / "model.safetensors").read_bytes()).hexdigest()
    told = recipe.read(made).controls[0]
    assert (told.preprocess, told.estimators) == ("depth", (("depth-here", digest),))
    (tmp_path / "photo.png").write_bytes(png)
    tiny_ones.save_depth(folder / "another", seed=9)
    other = replace(settings, depth_model="another")
    (again,) = command.generate({}, made, tmp_path / "again.png", other)  # the recipe's model, not the server's
    assert again.read_bytes() == made.read_bytes()
    (new,) = command.generate({**fields, "controls": [control]}, None, tmp_path / "new.png", other)
    assert not np.array_equal(np.asarray(Image.open(new)), np.asarray(Image.open(made)))
