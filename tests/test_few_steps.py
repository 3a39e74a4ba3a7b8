"""Models distilled to a few steps are drawn with few where nobody says how many."""

from __future__ import annotations

from typing import Any

import pytest

from sfumato.checkpoints import few_steps
from sfumato.drawing.draw import draw
from sfumato.drawing.info import model_info
from support import families, tiny
from support.drawing import loaded, quiet, wanted

SD, FLUX = "StableDiffusionXLPipeline", "FluxPipeline"


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "denoiser", "name", "expected"),
    [
        (SD, "EulerAncestralDiscreteScheduler", {}, "stabilityai/sdxl-turbo", (4, 0.0)),
        (SD, "EulerDiscreteScheduler", {}, "ByteDance/sdxl_lightning_8step.safetensors", (8, 0.0)),
        (SD, "EulerDiscreteScheduler", {}, "Hyper-SDXL-1step-Unet.safetensors", (1, 0.0)),
        (SD, "LCMScheduler", {"time_cond_proj_dim": 256}, "SimianLuo/LCM_Dreamshaper_v7", (4, 8.0)),
        (SD, "LCMScheduler", {}, "someone/with-lcm-lora", (4, 1.0)),
        (SD, "TCDScheduler", {}, "a/b", (4, 1.0)),
        (FLUX, "FlowMatchEulerDiscreteScheduler", {"guidance_embeds": False}, "a/b", (4, 0.0)),
        (FLUX, "FlowMatchEulerDiscreteScheduler", {"guidance_embeds": True}, "black-forest-labs/FLUX.1-dev", None),
        ("ZImagePipeline", "FlowMatchEulerDiscreteScheduler", {}, "Tongyi-MAI/Z-Image-Turbo", (9, 0.0)),
        ("QwenImagePipeline", "FlowMatchEulerDiscreteScheduler", {"guidance_embeds": False}, "Qwen/Qwen-Image", None),
        ("SanaPipeline", "DPMSolverMultistepScheduler", {"guidance_embeds": False}, "a/sana", None),
        ("Flux2KleinPipeline", "FlowMatchEulerDiscreteScheduler", {"guidance_embeds": False}, "a/klein-base", None),
        (SD, "EulerDiscreteScheduler", {}, "stabilityai/stable-diffusion-xl-base-1.0", None),
        (SD, "EulerDiscreteScheduler", {}, "someone/turbocharged-steps", None),
        (SD, "EulerDiscreteScheduler", {}, "someone/overturbo", None),
        (SD, "EulerDiscreteScheduler", {}, "my-lora-500-steps.safetensors", None),
        (SD, "EulerDiscreteScheduler", {}, "sd15-12-step-study", None),
        (SD, "EulerDiscreteScheduler", {}, "sdxlTurbo_v2.safetensors", (4, 0.0)),
        (SD, "EulerDiscreteScheduler", {}, "RealVisXL_V40LightningBakedvae.safetensors", (4, 0.0)),
        (SD, "EulerDiscreteScheduler", {}, "TurboCat/xl_lightning_500_steps", (4, 0.0)),
    ],
)
def test_what_says_so(
    pipeline: str, scheduler: str, denoiser: dict[str, Any], name: str, expected: tuple[int, float] | None
) -> None:
    values = few_steps.of(pipeline, scheduler, denoiser, {}, name)
    assert tuple(values.values()) == (expected or ())


def test_a_distilled_index_says_so() -> None:
    values = few_steps.of("Flux2KleinPipeline", "FlowMatchEulerDiscreteScheduler", {}, {"is_distilled": True}, "a/b")
    assert values == {"num_inference_steps": 4, "guidance_scale": 1.0}


@pytest.mark.parametrize(
    ("pipe", "fields", "request_fields", "expected"),
    [
        (families.consistency, {}, {}, (4, 8.0)),
        (tiny.stable_diffusion, {"model": "stabilityai/sd-turbo"}, {}, (4, 0.0)),
        # What the file or a request says counts.
        (tiny.stable_diffusion, {"model": "stabilityai/sd-turbo", "steps": 2}, {}, (2, 0.0)),
        (tiny.stable_diffusion, {"model": "stabilityai/sd-turbo"}, {"steps": 3, "guidance_scale": 2.0}, (3, 2.0)),
        (tiny.stable_diffusion, {"model": "a/b"}, {}, (30, 8.0)),
    ],
)
def test_requests_that_say_nothing_get_few(
    pipe: Any, fields: dict[str, Any], request_fields: dict[str, Any], expected: tuple[int, float]
) -> None:
    model = loaded(pipe(), **fields)
    asked = wanted(width=64, height=64, **{"steps": None, **request_fields})
    sampling = draw(model, asked, quiet).recipe.sampling
    assert (sampling.steps, sampling.guidance_scale) == expected
    if not request_fields:
        told = model_info(model).sampling
        assert (told.steps, told.guidance_scale) == expected
