"""Rows 32 and 33 of the cases: what LocalAI does for Flux, and the precision that a family is made for."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.config import ModelConfig
from sfumato.core import Done
from sfumato.drawing.draw import draw
from sfumato.drawing.info import model_info
from sfumato.models import device, load, precision
from sfumato.pictures.images import decoded
from support import tiny
from support.drawing import quiet, wanted
from support.model_files import read

LONG = "cat dog " * 40
"""320 tokens."""


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    tiny.save(tiny.flux(), folder / "dev")
    schnell = tiny.flux()
    with tiny.seeded(5):
        schnell.register_modules(
            transformer=FluxTransformer2DModel.from_config({**schnell.transformer.config, "guidance_embeds": False})
        )
    tiny.save(schnell, folder / "schnell")
    return folder


def picture(model: load.Loaded, **fields: Any) -> Done:
    return draw(model, wanted(prompt=LONG, width=64, height=64, **fields), quiet)


def pixels(done: Done) -> Any:
    return np.asarray(decoded(done.file)).astype(int)


# Row 32: how many tokens of a prompt T5 reads.

LIMITS = [
    ("dev", "diffusers: {pipeline_type: FluxPipeline}", 256),
    ("dev", "", 512),
    ("schnell", "", 256),
    ("schnell", "diffusers: {pipeline_type: FluxPipeline}", 256),
    ("dev", "diffusers: {pipeline_type: FluxPipeline}\noptions: ['max_sequence_length:32']", 32),
    ("dev", "diffusers: {pipeline_type: FluxPipeline}\nmax_sequence_length: 512", 512),
    ("schnell", "diffusers: {max_sequence_length: 64}", 64),
]


@pytest.mark.parametrize(("name", "text", "limit"), LIMITS)
def test_row_32_tokens(
    name: str, text: str, limit: int, flux: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As many as LocalAI and schnell's training have; the file can say another number."""
    config = read(tmp_path, f"parameters: {{model: {flux / name}}}\ncuda: false\ndtype: fp32\n{text}\n")
    seen: list[int] = []
    with caplog.at_level(logging.INFO, "sfumato"):
        model = load.load(config, "cpu", quiet)
    model.pipeline.text_encoder_2.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    done = picture(model)
    assert seen == [limit]
    assert done.recipe.sampling.max_sequence_length == (None if limit == 512 and not text else limit)
    assert model_info(model).sampling.max_sequence_length == limit
    assert model_info(model).prompt_tokens == static_capabilities(config).prompt_tokens == max(limit, 77)
    assert any(warning.endswith(f"takes {max(limit, 77)}") for warning in done.warnings) == (limit < 400)
    assert ("up to 256 tokens" in caplog.text) == (limit == 256)


def test_row_32_a_request_says_another_number(flux: Path, tmp_path: Path) -> None:
    text = f"parameters: {{model: {flux / 'dev'}}}\ndtype: fp32\ndiffusers: {{pipeline_type: FluxPipeline}}\n"
    model = load.load(read(tmp_path, text), "cpu", quiet)
    plain, long = picture(model), picture(model, max_sequence_length=512)
    assert (plain.recipe.sampling.max_sequence_length, long.recipe.sampling.max_sequence_length) == (256, 512)
    assert np.abs(pixels(plain) - pixels(long)).max() > 0
    assert np.array_equal(pixels(picture(model, max_sequence_length=256)), pixels(plain))


# Row 33: float16 or bfloat16.

MADE_FOR = [
    ("FluxPipeline", "bf16"), ("Flux2Pipeline", "bf16"), ("ChromaPipeline", "bf16"), ("QwenImagePipeline", "bf16"),
    ("ZImagePipeline", "bf16"), ("HiDreamImagePipeline", "bf16"), ("SanaPipeline", "bf16"), ("WanPipeline", "bf16"),
    ("CogView4Pipeline", "bf16"), ("Lumina2Pipeline", "bf16"), ("BriaFiboPipeline", "bf16"),
    ("FluxControlNetInpaintPipeline", "bf16"), ("FluxImg2ImgPipeline", "bf16"),
    ("StableDiffusionPipeline", "fp16"), ("StableDiffusionXLPipeline", "fp16"), ("KolorsPipeline", "fp16"),
    ("StableDiffusionXLControlNetPipeline", "fp16"), ("StableDiffusion3Pipeline", "fp16"),
    ("PixArtSigmaPipeline", "fp16"), ("DDPMPipeline", "fp16"), ("StableDiffusionInpaintPipeline", "fp16"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), MADE_FOR)
def test_row_33_by_pipeline_class(name: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig(name="m", model="m", f16=True, pipeline_type=name)
    assert device.choose_dtype(config, "cuda") == device.choose_dtype(config, "cuda:1") == dtype
    assert ("made for bfloat16" in caplog.text) == (dtype == "bf16")
    without = "fp32" if config.pipeline_type == "DDPMPipeline" else "bf16"  # numpy has no bfloat16
    assert device.choose_dtype(replace(config, f16=False), "cuda") == without
    assert device.choose_dtype(replace(config, dtype="fp16"), "cuda") == "fp16"
    assert device.choose_dtype(replace(config, f16=False), "cpu") == device.choose_dtype(config, "cpu")


@pytest.mark.parametrize(
    ("index", "dtype"),
    [
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, "bf16"),
        ({"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}, "fp16"),
        ({"transformer": ["a", "Unheard2DModel"], "text_encoder_2": ["transformers", "T5EncoderModel"]}, "bf16"),
        ({"transformer": ["a", "Unheard2DModel"], "text_encoder": ["transformers", "Qwen9Model"]}, "bf16"),
        ({"transformer": ["a", "Unheard2DModel"], "text_encoder": ["transformers", "CLIPTextModel"]}, "fp16"),
        ({"transformer": [None, None], "prior": ["diffusers", "StableCascadeUNet"]}, "bf16"),
        ({"_class_name": "FluxPipeline"}, "fp16"),
    ],
)
def test_row_33_by_repository(index: dict[str, Any], dtype: str) -> None:
    """The repository's denoiser is known where the file names no class; an unheard one by its text encoder."""
    assert precision.made_for(None, index) == dtype
    assert device.choose_dtype(ModelConfig(name="m", model="m", f16=True), "cuda", index) == dtype


def test_row_33_a_loaded_model_has_it(
    flux: Path, repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word of its class in the file, and without a GPU: only where it would be put is another place."""
    monkeypatch.setattr(load, "choose_device", lambda config, setting: "cuda")
    monkeypatch.setattr(load, "_place", lambda *args: "none")
    monkeypatch.setattr(load, "_load_preview_decoder", lambda *args: None)
    for folder, dtype in ((flux / "dev", torch.bfloat16), (repositories["nitrosocke/Ghibli-Diffusion"], torch.float16)):
        pipeline = load.load(ModelConfig(name="m", model=str(folder), f16=True), "cuda", quiet).pipeline
        denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
        assert denoiser.dtype == dtype
        assert pipeline.text_encoder.dtype == dtype


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline", "LDMTextToImagePipeline", "VQDiffusionPipeline"])
def test_a_class_that_gives_numpy_its_pictures_is_not_drawn_in_bf16(name: str) -> None:
    """numpy has no bfloat16, in which these would be a TypeError after all their steps."""
    index = {"_class_name": name}
    config = ModelConfig(name="m", model="m")
    assert device.choose_dtype(config, "cuda", index) == "fp32"
    assert device.choose_dtype(replace(config, pipeline_type=name), "cuda") == "fp32"
    assert device.choose_dtype(replace(config, dtype="fp16"), "cuda", index) == "fp16"
    assert device.choose_dtype(config, "cuda", {"_class_name": "StableDiffusionPipeline"}) == "bf16"
