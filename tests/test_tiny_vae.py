"""`vae: tiny`: the tiny autoencoder made for a model's latents, from the hub, draws what diffusers draws with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sfumato.checkpoints import diffusers_source, tiny_vaes
from sfumato.commands.check import check
from sfumato.drawing.draw import draw
from sfumato.errors import InvalidRequest, ModelFileError
from sfumato.models import fetch, load, parts
from sfumato.pictures.images import decoded
from sfumato.serving.catalog import Catalog
from support import families_transformers, tiny
from support.drawing import source
from support.here import asked, config, cut, quiet, use
from support.hub import Hub


def tiny_vae(channels: int) -> diffusers.AutoencoderTiny:
    with tiny.seeded(1):
        return diffusers.AutoencoderTiny(
            latent_channels=channels, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
        ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    made = {
        "sd": tiny.stable_diffusion, "sd3": tiny.stable_diffusion_3, "flux": tiny.flux,
        "qwen": families_transformers.qwen_image,
    }  # fmt: skip
    return {name: tiny.save(make(), root / name) for name, make in made.items()}


@pytest.fixture
def hub(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    for repository, channels in (("madebyollin/taesd", 4), ("madebyollin/taesd3", 16)):
        tiny_vae(channels).save_pretrained(tmp_path / repository)
        hub.add(repository, tmp_path / repository)
    for name, folder in folders.items():
        hub.add(f"tiny/{name}", folder)
    use(hub, tmp_path / "cache", monkeypatch)
    yield hub
    hub.close()


def call(seed: int, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"prompt": "a cat", "num_inference_steps": 4, "generator": generator, "output_type": "np", **more}


@pytest.mark.parametrize(("name", "channels"), [("sd", 4), ("sd3", 16)])
def test_it_decodes_as_diffusers_does(
    name: str, channels: int, hub: Hub, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[name], vae=tiny_vae(channels))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**call(1, width=64, height=64)).images[0]
    made = config(tmp_path, f"tiny/{name}", vae="tiny", preview_vae="tiny")
    parts.fetch(made, fetch.fetch(made, "fp32", quiet).path, quiet)
    cut(monkeypatch)  # what was fetched is found again
    model = load.load(made, "cpu", quiet)
    assert isinstance(model.pipeline.vae, diffusers.AutoencoderTiny)
    assert model.config == made
    picture = np.asarray(decoded(draw(model, asked(steps=4), quiet).file)).astype(int)
    assert np.abs(picture - np.round(expected * 255)).max() <= 1
    # A source picture is encoded by it, too.
    changed = np.asarray(decoded(draw(model, asked(steps=4, images=(source(64, 64),)), quiet).file))
    assert changed.shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("vae", "repository"),
    [
        ({"latent_channels": 4, "scaling_factor": 0.18215}, "madebyollin/taesd"),
        ({}, "madebyollin/taesd"),  # Stable Diffusion 1.5 says nothing
        ({"scaling_factor": 0.13025}, "madebyollin/taesdxl"),
        ({"latent_channels": 16, "scaling_factor": 1.5305}, "madebyollin/taesd3"),
        ({"latent_channels": 16, "scaling_factor": 0.3611}, "madebyollin/taef1"),
    ],
)
def test_the_family_is_told_from_the_vae(vae: dict[str, Any], repository: str, tmp_path: Path) -> None:
    made = config(tmp_path, "a/b", vae="tiny", preview_vae="tiny")
    named = tiny_vaes.resolve(made, {"_class_name": "AutoencoderKL", **vae})
    assert (named.vae, named.preview_vae) == (repository, repository)


def test_the_shipped_descriptions_have_one(tmp_path: Path) -> None:
    """Single files of Stable Diffusion 1, 2 and XL say which they are by what describes them."""
    made = config(tmp_path, "a/b", vae="tiny")
    found = {
        tiny_vaes.resolve(made, diffusers_source.json_of(path)).vae
        for path in Path(tiny_vaes.__file__).parent.rglob("vae/config.json")
    }
    assert found == {"madebyollin/taesd", "madebyollin/taesdxl"}


@pytest.mark.parametrize("key", ["vae", "preview_vae"])
def test_latents_without_one_are_refused_before_the_download(key: str, hub: Hub, tmp_path: Path) -> None:
    made = config(tmp_path, "tiny/qwen", **{key: "tiny"})
    with pytest.raises(
        ModelFileError, match=r"no tiny autoencoder known.*AutoencoderKLQwenImage.*Stable Diffusion"
    ) as caught:
        load.load(made, "cpu", quiet)
    assert caught.value.param == {"vae": "vae", "preview_vae": "diffusers.preview_vae"}[key]
    assert not any(path.endswith(".safetensors") for path in hub.downloads("tiny/qwen"))


def test_a_class_that_samples_from_the_vae_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    text = f"parameters: {{model: {folders['flux']}}}\nvae: tiny\n"
    (tmp_path / "m.yaml").write_text(f"{text}diffusers: {{pipeline_type: FluxControlPipeline}}\n")
    (report,) = check(Catalog([tmp_path]))
    assert "vae: FluxControlPipeline cannot encode pictures with a tiny one" in str(report), report


def test_a_request_that_needs_such_a_class_is_refused(folders: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    model = load.load(config(tmp_path, folders["sd3"], vae="tiny"), "cpu", quiet)
    net = diffusers.SD3ControlNetModel.from_transformer(model.pipeline.transformer, num_layers=1)
    model.pipeline = diffusers.StableDiffusion3ControlNetPipeline(**model.pipeline.components, controlnet=net)
    with pytest.raises(InvalidRequest, match="has a tiny VAE"):
        draw(model, asked(images=(source(64, 64),)), quiet)
