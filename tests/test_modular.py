"""diffusers' modular pipelines: the same pictures alone and together, per request what a request sets."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.batching import offload
from sfumato.batching.exclusive import exclusive
from sfumato.batching.views import view
from sfumato.config import ModelConfig
from sfumato.drawing import arguments
from sfumato.drawing.draw import RunStopped, draw
from sfumato.drawing.info import model_info
from sfumato.errors import InvalidRequest
from sfumato.models import load, precision
from sfumato.pictures.images import decoded
from sfumato.pipelines import capabilities, request_scheduler
from sfumato.pipelines.modular import adapted
from support import modular, modular_newer, tiny
from support.drawing import loaded, quiet, source, wanted
from support.families import half_mask, picture
from support.families_transformers import qwen_image, z_image
from support.gathered import SQUARE, alone, check, seeded
from support.pictures import encoded

BUILD = {**modular.BUILD, **modular_newer.BUILD}

SHORT: dict[str, Any] = {"text_encoder_out_layers": (1,)}
MORE = {"Flux2": SHORT, "Flux2Klein": SHORT, "Flux2KleinBase": SHORT}
"""What the tiny text encoders of a family need."""

TOGETHER = [
    {"prompt": "a cat", "num_inference_steps": 3, **SQUARE},
    {"prompt": "a dog on a long road", "num_inference_steps": 5, **SQUARE},
    {"prompt": "x", "num_inference_steps": 4, **SQUARE},
]


def pixels(done: Any) -> Any:
    return np.asarray(decoded(done.file)).astype(int)


def by_step(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With Ideogram 4's guidance for each step, and no more than a few tokens."""
    return [
        {**c, "guidance_schedule": [c["num_inference_steps"] + 1.0] * c["num_inference_steps"]}
        | {"max_sequence_length": 32}
        for c in calls
    ]


@pytest.mark.parametrize("family", BUILD)
def test_each_equals_the_plain_pipeline_alone_and_shares_forward_passes(family: str) -> None:
    pipe = BUILD[family]()
    calls = [call | MORE.get(family, {}) for call in TOGETHER]
    if family == "ErnieImage":  # its denoiser reads texts of one length together
        calls = [{**call, "prompt": prompt} for call, prompt in zip(calls, ("a cat", "a dog", "a cow"), strict=True)]
    stats = check(pipe, by_step(calls) if family == "Ideogram4" else calls)
    denoiser = stats["unet" if "unet" in stats else "transformer"]
    assert denoiser["mean_batch"] > (1.2 if family == "Ideogram4" else 1.7)  # it has two denoisers, in turns


def test_pictures_and_masks_are_drawn_together() -> None:
    pipe = modular.BUILD["StableDiffusionXL"]()
    calls = [
        {"prompt": "a cat", "num_inference_steps": 4, **SQUARE},
        {"prompt": "a dog", "num_inference_steps": 5, "image": picture(1), "strength": 0.8},
        {"prompt": "x", "num_inference_steps": 5, "image": picture(2), "mask_image": half_mask(), "strength": 0.9},
    ]
    assert check(pipe, calls)["unet"]["mean_batch"] > 1.5


def test_guidance_is_of_each_request_and_leaves_the_pipeline_as_it_was() -> None:
    pipe = modular.BUILD["StableDiffusionXL"]()
    calls = seeded([{"prompt": "a cat", "num_inference_steps": 3, **SQUARE, "generator": 1}] * 3)
    generators = [torch.Generator().manual_seed(1) for _ in calls]
    scales = (1.0, 5.0, 9.0)
    got = sfumato.gather(
        pipe,
        [
            {**call, "guidance_scale": scale, "generator": generator}
            for call, scale, generator in zip(calls, scales, generators, strict=True)
        ],
    )
    assert pipe.guider.guidance_scale == 7.5
    for scale, output in zip(scales, got, strict=True):
        pipe.update_components(guider=d.ClassifierFreeGuidance(guidance_scale=scale))
        call = {**calls[0], "generator": torch.Generator().manual_seed(1)}
        np.testing.assert_allclose(output.images, pipe(**call).images, atol=1e-4)


def test_settings_of_a_guider_are_arguments() -> None:
    pipe = adapted(modular.BUILD["StableDiffusionXL"]())
    parameters = capabilities.parameters_of(pipe)
    assert parameters["guidance_scale"].default == 7.5
    assert parameters["guidance_rescale"].default == 0.0
    pipe = modular.BUILD["StableDiffusionXL"]()
    pipe.update_components(guider=d.AdaptiveProjectedGuidance(guidance_scale=4.0))
    parameters = capabilities.parameters_of(adapted(pipe))
    assert parameters["guidance_scale"].default == 4.0
    assert "adaptive_projected_guidance_momentum" in parameters


def test_a_guider_that_hooks_into_the_denoiser_runs_alone() -> None:
    pipe = modular.BUILD["StableDiffusion3"]()
    pipe.update_components(
        guider=d.SkipLayerGuidance(skip_layer_guidance_layers=[0], skip_layer_guidance_start=0.0, guidance_scale=3.0)
    )
    assert "SkipLayerGuidance" in exclusive(adapted(pipe))
    stats = check(pipe, [{**call, "negative_prompt": "bad"} for call in TOGETHER])
    assert stats["transformer"]["mean_batch"] == 1.0


def test_blocks_are_of_each_request() -> None:
    pipe = adapted(modular.BUILD["Flux"]())
    one, other = view(pipe), view(pipe)
    assert one._blocks is not other._blocks
    assert one.transformer is not pipe.transformer


ORDINARY = {
    "StableDiffusionXL": tiny.stable_diffusion_xl,
    "StableDiffusion3": tiny.stable_diffusion_3,
    "Flux": tiny.flux,
    "QwenImage": qwen_image,
    "ZImage": z_image,
}


@pytest.mark.parametrize("family", ORDINARY)
def test_the_schedulers_are_those_of_the_ordinary_class(family: str) -> None:
    pipe = adapted(modular.BUILD[family]())
    assert not request_scheduler.keeps_own(pipe)
    assert request_scheduler.works_with(pipe) == request_scheduler.works_with(ORDINARY[family]())


TASKS = {
    "StableDiffusionXL": ("text-to-image", "image-to-image", "inpainting"),
    "StableDiffusion3": ("text-to-image", "image-to-image"),
    "FluxKontext": ("text-to-image", "image-to-image"),
    "Flux2": ("text-to-image", "image-to-image"),
    "QwenImage": ("text-to-image", "image-to-image", "inpainting"),
    "Anima": ("text-to-image", "image-to-image"),
}


@pytest.mark.parametrize("family", TASKS)
def test_tasks_are_those_of_the_workflows(family: str) -> None:
    assert capabilities.tasks(adapted(modular.BUILD[family]())) == TASKS[family]


@pytest.mark.parametrize(
    ("name", "tasks"),
    [("QwenImageEdit", ("image-to-image", "inpainting")), ("QwenImageEditPlus", ("image-to-image",)),
     ("QwenImageLayered", ("image-to-image",)), ("Ideogram4", ("text-to-image",)),
     ("Krea2Turbo", ("text-to-image",))],
)  # fmt: skip
def test_tasks_of_classes_that_are_too_large_for_tests(name: str, tasks: tuple[str, ...]) -> None:
    assert capabilities.tasks(adapted(getattr(d, f"{name}ModularPipeline")())) == tasks


def test_drawn_with_defaults_a_scheduler_previews_and_a_recipe() -> None:
    model = loaded(adapted(modular.BUILD["StableDiffusionXL"]()))
    info = model_info(model)
    assert info.pipeline == "StableDiffusionXLModularPipeline"
    assert (info.sampling.steps, info.sampling.guidance_scale, info.sampling.size) == (30, 8.0, (64, 64))
    previews: list[Any] = []
    asked = wanted(prompt="a cat", steps=5, width=64, height=64, scheduler="euler_a", guidance_scale=3.0, previews=2)
    done = draw(model, asked, quiet, previews.append)
    assert len(previews) == 2
    assert done.recipe.pipeline == "StableDiffusionXLModularPipeline"
    assert (done.recipe.sampling.scheduler, done.recipe.sampling.guidance_scale) == ("euler_a", 3.0)
    assert done.recipe.sampling.strength is None
    assert not done.warnings
    again = draw(model, wanted(prompt="a cat", **{"steps": 5, "width": 64, "height": 64}, scheduler="euler_a",
                               guidance_scale=3.0), quiet)  # fmt: skip
    assert (pixels(again) == pixels(done)).all()
    other = draw(model, wanted(prompt="a cat", steps=5, width=64, height=64, guidance_scale=3.0), quiet)
    assert (pixels(other) != pixels(done)).any()
    assert type(model.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"


def test_a_picture_and_a_mask_are_taken_where_the_blocks_take_them() -> None:
    model = loaded(adapted(modular.BUILD["StableDiffusionXL"]()))
    asked = wanted(prompt="a cat", steps=4, strength=0.9, images=(source(64, 64),))
    assert draw(model, asked, quiet).recipe.sampling.strength == 0.9
    mask = encoded(Image.new("L", (64, 64), "white"))
    assert draw(model, wanted(prompt="a cat", steps=4, images=(source(64, 64),), mask=mask), quiet).recipe.mask_sha256
    flux = loaded(adapted(modular.BUILD["Flux"]()))
    with pytest.raises(InvalidRequest, match="does not take mask_image"):
        draw(flux, wanted(prompt="a cat", images=(source(64, 64),), mask=mask), quiet)


@pytest.mark.parametrize("family", ["Flux", "QwenImage", "ZImage", "Anima"])
def test_previews_of_tokens_are_pictures(family: str) -> None:
    previews: list[Any] = []
    model = loaded(adapted(modular.BUILD[family]()))
    draw(model, wanted(prompt="a cat", steps=4, width=64, height=96, previews=1), quiet, previews.append)
    assert [(each.width, each.height) for each in previews] == [(64, 96)]


def test_a_request_is_stopped_within_a_step_and_the_next_one_is_drawn() -> None:
    model = loaded(adapted(modular.BUILD["Flux"]()))
    asked = wanted(prompt="a cat", steps=4, width=64, height=64)
    before = pixels(draw(model, asked, quiet))

    def stop(done: int, total: int) -> None:
        raise RunStopped

    with pytest.raises(RunStopped):
        draw(model, asked, stop)
    assert (pixels(draw(model, asked, quiet)) == before).all()


def test_what_the_blocks_refuse_is_a_fault_of_the_request() -> None:
    model = loaded(adapted(modular.BUILD["Anima"]()))
    with pytest.raises(InvalidRequest, match="divisible by 16"):
        draw(model, wanted(prompt="a cat", width=72, height=64), quiet)


def test_modules_wait_in_main_memory_if_they_have_to() -> None:
    pipe = modular.BUILD["Flux"]()
    calls = [{"prompt": "a cat", "num_inference_steps": 2, **SQUARE}]
    (before,) = alone(pipe, calls)
    moved = adapted(pipe)
    offload.enable(moved, "cpu")
    assert len(moved._all_hooks) == 4
    np.testing.assert_array_equal(moved(**seeded(calls)[0]).images, before)
    offload.offload_all(moved)
    offload.enable_groups(moved, "cpu", precision.is_denoiser)
    assert not offload.enabled(moved)
    np.testing.assert_array_equal(moved(**seeded(calls)[0]).images, before)


@pytest.mark.parametrize(("family", "options"), [("ErnieImage", {}), ("Ideogram4", {"max_sequence_length": "32"})])
def test_newer_families_are_saved_loaded_and_drawn_in_any_number_of_steps(
    family: str, options: dict[str, str], tmp_path: Path
) -> None:
    pipe = BUILD[family]()
    modular.save(pipe, tmp_path / "w")
    config = ModelConfig(name="m", model=str(tmp_path / "w"), dtype="fp32", option_lines=tuple(options.items()))
    model = load.load(config, "cpu", quiet)
    assert capabilities.tasks(model.pipeline) == ("text-to-image",)
    for steps in (2, 3):
        done = draw(model, wanted(prompt="a cat", steps=steps, seed=4, **SQUARE), quiet)
        call = {
            "prompt": "a cat",
            "num_inference_steps": steps,
            **SQUARE,
            "generator": torch.Generator().manual_seed(4),
        }
        if family == "Ideogram4":
            call |= {"guidance_schedule": [7.0] * steps, "max_sequence_length": 32}
        assert np.array_equal(pixels(done), np.asarray(pipe(**call).images[0]).astype(int))


def test_numbers_for_each_step_are_spread_over_the_steps_there_are() -> None:
    def call(
        num_inference_steps: int = 4, guidance_schedule: Any = (7.0, 7.0, 7.0, 3.0), guidance_scale: Any = None
    ): ...

    parameters = inspect.signature(call).parameters
    assert arguments._by_step(parameters, {"num_inference_steps": 4}) == {}
    assert arguments._by_step(parameters, {"num_inference_steps": 2}) == {"guidance_schedule": [7.0, 7.0]}
    stretched = arguments._by_step(parameters, {"num_inference_steps": 8})["guidance_schedule"]
    assert stretched == [7.0] * 6 + [3.0] * 2
    assert arguments._by_step(parameters, {"guidance_scale": 5.0}) == {"guidance_schedule": None}
