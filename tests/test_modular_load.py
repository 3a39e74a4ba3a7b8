"""Modular repositories from folders and from a hub: every component from its own place, and nothing else is run."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sfumato.api.app import create_app
from sfumato.checkpoints import pipeline_class
from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.commands.check import check
from sfumato.config.model import Adapter, ModelConfig
from sfumato.drawing.draw import draw
from sfumato.engine.local import Local
from sfumato.errors import LoadError, ModelFileError, SfumatoError
from sfumato.models import load, low_memory, quantizers
from sfumato.pictures.images import decoded
from sfumato.pictures.stores import store_of
from sfumato.pipelines import capabilities
from sfumato.serving.catalog import Catalog
from sfumato.serving.service import Service
from sfumato.settings import Settings
from support import modular, modular_newer, tiny
from support.drawing import wanted
from support.here import config, cut, drawn, quiet, use
from support.hub import Hub

INDEX = "modular_model_index.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of modular pipelines, and of ordinary ones beside them."""
    root = tmp_path_factory.mktemp("modular")
    for family in ("StableDiffusionXL", "Flux", "Anima"):
        modular.save(modular.BUILD[family](), root / family)
    tiny.save(tiny.stable_diffusion_xl(), root / "plain")
    return root


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A folder of the modular Flux to change."""
    return Path(shutil.copytree(root / "Flux", tmp_path / "Flux"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub() as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def changed(folder: Path, **entries: Any) -> Path:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | entries))
    return folder


@pytest.mark.parametrize("family", ["StableDiffusionXL", "Flux", "Anima"])
def test_a_folder_is_loaded_and_its_capabilities_are_known_before(family: str, root: Path, tmp_path: Path) -> None:
    made = config(tmp_path, root / family)
    known = static_capabilities(made)
    model = load.load(made, "cpu", quiet)
    assert type(model.pipeline).__name__ == known.pipeline == f"{family}ModularPipeline"
    assert known.tasks == capabilities.tasks(model.pipeline)
    assert drawn(made).shape == (64, 64, 3)
    (tmp_path / "m.yaml").write_text(f"name: m\nparameters:\n  model: {root / family}\n")
    (report,) = check(Catalog([tmp_path]))
    assert not report.problems
    assert f"{family}ModularPipeline, as {INDEX} says" in str(report)


def test_an_ordinary_repository_is_drawn_by_the_modular_class_that_the_file_names(root: Path, tmp_path: Path) -> None:
    for name in ("StableDiffusionXLModularPipeline", "ModularPipeline"):
        made = config(tmp_path, root / "plain", pipeline_type=name)
        assert type(load.load(made, "cpu", quiet).pipeline).__name__ == "StableDiffusionXLModularPipeline"
    (tmp_path / "other").mkdir()
    same = drawn(config(tmp_path, root / "StableDiffusionXL"))
    assert (drawn(made) == same).all()


def test_a_class_that_exists_only_in_blocks_is_found_from_an_ordinary_index(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "Anima", tmp_path / "Anima"))
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).unlink()
    parts = {name: entry[:2] for name, entry in index.items() if isinstance(entry, list)}
    (folder / "model_index.json").write_text(json.dumps(parts | {"_class_name": "AnimaPipeline"}))
    made = config(tmp_path, folder)
    assert static_capabilities(made).pipeline == "AnimaModularPipeline"
    assert (drawn(made) == drawn(config(tmp_path, root / "Anima"))).all()


def test_components_come_from_their_own_repositories_and_load_offline(
    root: Path, copy: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("vae", "tokenizer"):
        shutil.rmtree(copy / part)
        modular.moved(copy, part, "the/parts")
    for part in ("transformer", "text_encoder", "text_encoder_2", "tokenizer_2", "scheduler"):
        modular.moved(copy, part, "the/model")
    hub.add("the/model", copy)
    hub.add("the/parts", root / "Flux")
    made = config(tmp_path, "the/model")
    expected = drawn(config(tmp_path, root / "Flux"))
    assert (drawn(made) == expected).all()
    assert not {path for path in hub.downloads("the/parts") if path.startswith(("transformer", "text_encoder"))}
    assert set(hub.downloads("the/parts").values()) | set(hub.downloads("the/model").values()) == {1}
    cut(monkeypatch)
    assert (drawn(made) == expected).all()


def test_a_folder_fetches_the_components_it_does_not_have(root: Path, copy: Path, hub: Hub, tmp_path: Path) -> None:
    shutil.rmtree(copy / "vae")
    modular.moved(copy, "vae", "the/parts")
    modular.moved(copy, "transformer", "not/there")  # it is in the folder
    hub.add("the/parts", root / "Flux")
    assert (drawn(config(tmp_path, copy)) == drawn(config(tmp_path, root / "Flux"))).all()


def refusal(made: Any) -> str:
    with pytest.raises(SfumatoError) as caught:
        load.load(made, "cpu", quiet)
    assert isinstance(caught.value, LoadError | ModelFileError)
    return caught.value.message


def test_code_of_repositories_is_never_run(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (copy / "block.py").write_text(f"open({str(marker)!r}, 'w')\nclass B: pass\n")
    auto_map = {"ModularPipelineBlocks": "block.B"}
    (copy / "modular_config.json").write_text(json.dumps({"_class_name": "B", "auto_map": auto_map}))
    changed(copy, _class_name="ModularPipeline", _blocks_class_name="B")
    assert "code from repositories is never run" in refusal(config(tmp_path, copy))
    changed(copy, _class_name="FluxModularPipeline", _blocks_class_name="FluxAutoBlocks")
    drawn(config(tmp_path, copy))  # with diffusers' own blocks
    index = json.loads((copy / INDEX).read_text())
    index["vae"][2]["type_hint"] = ["block", "B"]
    changed(copy, vae=index["vae"])
    assert "classes of block" in refusal(config(tmp_path, copy))
    assert not marker.exists()


def test_pickles_are_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").rename(copy / "vae" / "diffusion_pytorch_model.bin")
    assert "safetensors" in refusal(config(tmp_path, copy))


def test_a_missing_component_is_named(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "transformer")
    index = json.loads((copy / INDEX).read_text())
    del index["transformer"]
    (copy / INDEX).write_text(json.dumps(index))
    assert "needs transformer, which this repository does not have" in refusal(config(tmp_path, copy))


MISFITS = [
    ("WanModularPipeline", {}, "draws no pictures"),
    ("Flux9ModularPipeline", {}, "Flux9ModularPipeline, which diffusers .* does not have"),
    ("StableDiffusionXLModularPipeline", {"pipeline_type": "FluxModularPipeline"}, "of the family"),
    ("FluxModularPipeline", {"pipeline_type": "FluxPipeline"}, "Write `pipeline_type: FluxModularPipeline`"),
    ("FluxModularPipeline", {"control_net": "a/b"}, "control_net: FluxModularPipeline takes none"),
]


@pytest.mark.parametrize(("listed", "fields", "message"), MISFITS)
def test_what_cannot_be_drawn_is_said_before_the_download(
    listed: str, fields: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SfumatoError, match=message):
        pipeline_class.choose(config(tmp_path, "a/b", **fields), {"_class_name": listed})


def test_a_class_that_localai_writes_into_every_file_is_replaced(root: Path, tmp_path: Path) -> None:
    made = config(tmp_path, root / "Flux", pipeline_type="StableDiffusionPipeline")
    assert type(load.load(made, "cpu", quiet).pipeline).__name__ == "FluxModularPipeline"


def test_auto_classes_take_the_repository_s(root: Path, tmp_path: Path) -> None:
    made = config(tmp_path, root / "Flux", pipeline_type="AutoPipelineForText2Image")
    assert type(load.load(made, "cpu", quiet).pipeline).__name__ == "FluxModularPipeline"


def test_a_vae_of_the_model_file_replaces_the_model_s(root: Path, tmp_path: Path) -> None:
    other = tiny.stable_diffusion_xl(seed=5)
    other.vae.save_pretrained(tmp_path / "vae")
    before = drawn(config(tmp_path, root / "StableDiffusionXL"))
    after = drawn(config(tmp_path, root / "StableDiffusionXL", vae="vae"))
    assert np.abs(before - after).max() > 0


def test_over_http_pictures_of_one_request_share_forward_passes(root: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.yaml").write_text(f"name: m\nparameters:\n  model: {root / 'Flux'}\ndtype: fp32\n")
    settings = Settings(device="cpu", data=tmp_path / "data", log_level="error")
    engine = Local(settings)
    service = Service(Catalog([tmp_path / "models"]), engine, settings)
    body = {"model": "m", "prompt": "a cat", "size": "64x64", "step": 4, "seed": 1, "response_format": "b64_json"}
    with TestClient(create_app(service, store_of(settings)), client=("203.0.113.7", 50000)) as client:
        (before,) = client.get("/v1/models").json()["data"]
        answer = client.post("/v1/images/generations", json={**body, "n": 3, "guidance_scale": 2.0})
        assert answer.status_code == 200, answer.text
        again = client.post("/v1/images/generations", json={**body, "seed": 2, "guidance_scale": 2.0})
        assert again.json()["data"][0]["b64_json"] == answer.json()["data"][1]["b64_json"]
        (after,) = client.get("/v1/models").json()["data"]
        refused = client.post("/v1/images/generations", json={**body, "negative_prompt": "bad"})
        sizes = engine.stats.batch_sizes
    assert sizes[3] == 4, sizes
    assert before["sfumato"]["tasks"] == after["sfumato"]["tasks"] == ["text-to-image", "image-to-image"]
    assert refused.status_code == 400
    assert "FluxModularPipeline" in refused.json()["error"]["message"]


@pytest.mark.parametrize("family", ["StableDiffusionXL", "Flux"])
def test_a_lora_of_the_model_file_changes_the_picture(family: str, root: Path, tmp_path: Path) -> None:
    pipe = modular.BUILD[family]()
    name = "unet" if family == "StableDiffusionXL" else "transformer"
    denoiser = getattr(pipe, name)
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(denoiser)}
    type(pipe).save_lora_weights(tmp_path, **layers, weight_name="style.safetensors", safe_serialization=True)
    adapters = (Adapter("style.safetensors", 4.0),)
    before = drawn(config(tmp_path, root / family))
    assert np.abs(before - drawn(config(tmp_path, root / family, adapters=adapters))).max() > 0


FEW_TOKENS = {"Ideogram4": {"max_sequence_length": 32}}


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="the extra torchao is missing")
@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("Flux", {"transformer", "text_encoder_2"}),
        ("Anima", {"transformer", "text_encoder"}),
        ("Ideogram4", {"transformer", "unconditional_transformer", "text_encoder"}),
    ],
)
def test_quantised_blocks_draw_what_diffusers_draws(family: str, parts: set[str], tmp_path: Path) -> None:
    modular.save({**modular.BUILD, **modular_newer.BUILD}[family](), tmp_path / "w")
    more = FEW_TOKENS.get(family, {})
    lines = tuple((name, str(value)) for name, value in more.items())
    made = ModelConfig(name="m", model=str(tmp_path / "w"), dtype="fp32", quantization="int8", option_lines=lines)
    settings = quantizers.settings(made, json.loads((tmp_path / "w" / INDEX).read_text()), torch.float32)
    assert settings.keys() == parts
    plain = d.ModularPipeline.from_pretrained(str(tmp_path / "w"))
    for name in plain.pretrained_component_names:
        quantised = {"quantization_config": settings[name]} if name in settings else {}
        plain.load_components([name], dtype=torch.float32, **quantised)
    plain.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "num_inference_steps": 2, "width": 64, "height": 64, **more}
    call |= {"guidance_schedule": [7.0] * 2} if family == "Ideogram4" else {}
    expected = plain(**call, generator=torch.Generator().manual_seed(1)).images[0]
    model = load.load(made, "cpu", quiet)
    done = draw(model, wanted(prompt="a cat", width=64, height=64), quiet)
    assert np.array_equal(np.asarray(decoded(done.file)), np.asarray(expected))
    assert done.recipe.savings == ("quantization:int8",)
    resident = low_memory.sizes({**modular.BUILD, **modular_newer.BUILD}[family]())
    assert all(low_memory.sizes(model.pipeline)[part] < 0.85 * resident[part] for part in parts)
