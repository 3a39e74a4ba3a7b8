"""The guide to models: every key has an example, and its examples are drawn with tiny weights under the ids in them."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from typer.testing import CliRunner

from sfumato.cli import app
from sfumato.config.keys import KEYS, SECTIONS
from sfumato.serving.catalog import Catalog
from support import redux, tiny
from support.drawing import source
from support.here import drawn, use
from support.hub import Hub

GUIDE = (Path(__file__).parent.parent / "docs" / "guides" / "models.md").read_text()
BLOCKS = {yaml.safe_load(code)["name"]: code for code in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)}
DRAWN = [name for name in BLOCKS if not name.startswith("every-")]
SCHNELL = "black-forest-labs/FLUX.1-schnell"


def test_every_key_has_an_example() -> None:
    paths: set[str] = set()
    for code in BLOCKS.values():
        for key, value in yaml.safe_load(code).items():
            paths |= {f"{key}.{inner}" for inner in value} if key in SECTIONS else {key}
    assert {key.path for key in KEYS} - paths == set()


def lora(pipe: StableDiffusionPipeline, path: Path) -> None:
    """For one layer of the denoiser, under kohya's names."""
    name, layer = next(each for each in pipe.unet.named_modules() if each[0].endswith("to_q"))
    key = f"lora_unet_{name.replace('.', '_')}"
    down, up = torch.ones(2, layer.in_features) / 9, torch.ones(layer.out_features, 2)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    save_file({f"{key}.{part}": tensor for part, tensor in tensors.items()}, path)


@pytest.fixture(scope="module")
def place(
    repositories: dict[str, Path], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Hub, Path]]:
    """A hub with the ids of the guide, and a folder with the files that it takes to be there."""
    root = tmp_path_factory.mktemp("guide")
    models, files = root / "models", root / "files"
    for folder in (files, *(models / name for name in ("diffusion_models", "text_encoders", "vae"))):
        folder.mkdir(parents=True)
    sd = repositories["nitrosocke/Ghibli-Diffusion"]
    flux = FluxPipeline.from_pretrained(repositories["tiny/flux"])
    shutil.copy(checkpoint, models / "dream.safetensors")
    shutil.copy(checkpoint, models / "noob.safetensors")
    shutil.copy(checkpoint, files / "dream.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(sd)
    lora(pipe, models / "style.safetensors")
    lora(pipe, files / "detail.safetensors")
    tiny.gguf(files / "flux1-schnell-Q4_K_S.gguf")
    save_file(flux.transformer.state_dict(), models / "diffusion_models" / "flux1-schnell.safetensors")
    save_file(flux.text_encoder.state_dict(), models / "text_encoders" / "clip_l.safetensors")
    t5 = {name: tensor for name, tensor in flux.text_encoder_2.state_dict().items() if "embed_tokens" not in name}
    save_file(t5, models / "text_encoders" / "t5xxl_fp16.safetensors")
    save_file(flux.vae.state_dict(), models / "vae" / "ae.safetensors")
    v1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    prior = tiny.save(redux.redux(), root / "redux")
    with Hub() as hub:
        for repo, folder in {
            SCHNELL: repositories["tiny/flux"], "city96/FLUX.1-schnell-gguf": files, "owner/name": files,
            "owner/turbo": sd, "stabilityai/sd-vae-ft-mse": sd / "vae", v1: repositories[v1],
            "black-forest-labs/FLUX.1-Redux-dev": prior,
            "stabilityai/stable-diffusion-xl-base-1.0": repositories["Linaqruf/animagine-xl"],
        }.items():  # fmt: skip
            hub.add(repo, folder, card={"base_model": SCHNELL} if "gguf" in repo else None)
        yield hub, models


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # of the second LoRA
@pytest.mark.parametrize("name", DRAWN)
def test_examples_are_drawn(
    name: str, place: tuple[Hub, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(place[0], tmp_path / "cache", monkeypatch)
    models = shutil.copytree(place[1], tmp_path / "models")
    (models / "m.yaml").write_text(f"{BLOCKS[name]}\ndtype: fp32\n")
    config = Catalog([models]).get(name)
    picture = drawn(config, steps=2, width=64, height=64, images=(source(64, 64),) if config.prior else ())
    assert np.ptp(picture) > 0


def test_the_commands_run(place: tuple[Hub, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, _ = place
    use(hub, tmp_path / "cache", monkeypatch)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    said = []
    for line in code.splitlines():
        line = line.replace("https://host/dream", f"{hub.url}/owner/name/resolve/main/dream")
        command, *arguments = shlex.split(line, comments=True)
        assert command == "sfumato"
        done = CliRunner().invoke(app, arguments, input="y\n")
        assert done.exit_code == 0, done.output
        said.append(done.output)
    assert "models/FLUX.1-schnell.yaml: FluxPipeline" in said[0]
    base = yaml.safe_load((tmp_path / "models" / "flux1-schnell-Q4_K_S.yaml").read_text())["diffusers"]["base_model"]
    assert base == SCHNELL
    assert {path.name for path in (tmp_path / "models").iterdir() if path.name.startswith("dream")} == set()
