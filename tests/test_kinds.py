"""What a pipeline can be asked for: enlarging, transparency, tasks; and the facts that are told of a model."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from sfumato.config import ModelConfig
from sfumato.core import Generation, Limits
from sfumato.drawing import arguments
from sfumato.drawing.draw import draw
from sfumato.drawing.info import model_info
from sfumato.errors import DrawError, InvalidRequest
from sfumato.models.load import Loaded, load
from sfumato.pictures.images import decoded
from sfumato.pipelines import capabilities
from sfumato.sampling import NAMED, Sampling, flat
from sfumato.serving.catalog import EMBEDDED, Catalog
from sfumato.status import ModelInfo, ModelStatus
from support import loads, tiny
from support.drawing import loaded, quiet, source, wanted
from support.upscalers import UPSCALERS, four_times, twice

# Enlarging


@pytest.mark.parametrize("name", UPSCALERS)
def test_an_upscaler_enlarges_by_its_factor(name: str) -> None:
    build, factor, (width, height) = UPSCALERS[name]
    model = loaded(build())
    picture = wanted(images=(source(width, height),))
    done = draw(model, replace(picture, upscale=factor), quiet)
    assert decoded(done.file).size == (width * factor, height * factor)
    assert done.recipe.size == (width * factor, height * factor)
    # An ordinary request with a picture is the same to it.
    assert draw(model, picture, quiet).file == done.file
    known = model_info(model)
    assert (known.tasks, known.upscale, known.sampling.width) == (("upscaling",), factor, None)


@pytest.mark.parametrize("name", UPSCALERS)
def test_what_an_upscaler_refuses(name: str) -> None:
    build, factor, (width, height) = UPSCALERS[name]
    model = loaded(build())
    fits = (source(width, height),)
    odd = (source(width + 1, height),)
    for asked, param, words in (
        (wanted(images=fits, upscale=3 * factor), "scale", f"{factor} is valid"),
        (wanted(images=odd, upscale=factor), "image", f"{width + 1}x{height}.*nearest size is {width}x{height}"),
        (wanted(images=fits, width=64, height=64), "size", f"becomes {width * factor}x{height * factor}"),
        (wanted(), "image", "needs a source picture"),
        (wanted(images=fits, limits=Limits(2**22, factor * width - 1, 8)), "image", "max_side"),
        (wanted(images=fits, limits=Limits(factor**2 * width * height - 1, 4096, 8)), "image", "max_pixels"),
    ):
        with pytest.raises(InvalidRequest, match=words) as caught:
            draw(model, asked, quiet)
        assert caught.value.param == param


def test_a_source_that_would_be_resized_is_refused_for_a_reason() -> None:
    """The published latent upscaler halves its latents three times, and its blocks cannot make up for odd sides."""
    pipe = twice()
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        pipe("", image=Image.new("RGB", (80, 64)), num_inference_steps=1)


def test_other_models_do_not_enlarge() -> None:
    model = loaded(tiny.stable_diffusion())
    with pytest.raises(InvalidRequest, match="StableDiffusionUpscalePipeline, StableDiffusionLatentUpscale") as caught:
        draw(model, wanted(images=(source(64, 64),), upscale=4), quiet)
    assert caught.value.param == "model"


def test_weights_of_another_factor_are_no_upscaler() -> None:
    pipe = four_times()
    with tiny.seeded(0):
        pipe.register_modules(vae=tiny._vae(scaling_factor=0.08333))
        pipe.image_processor = VaeImageProcessor(vae_scale_factor=8)  # eight times
    with pytest.raises(DrawError, match="drew 256x256, not 128x128"):
        draw(loaded(pipe), wanted(images=(source(32, 32),)), quiet)


# Transparency


def with_alpha() -> Any:
    pipe = tiny.stable_diffusion()
    with tiny.seeded(1):
        pipe.register_modules(vae=tiny._vae(out_channels=4))
    return pipe


def test_an_alpha_channel_survives_to_the_png() -> None:
    model = loaded(with_alpha())
    for transparent in (True, False):  # a model that draws one always does
        asked = wanted(prompt="a cat", width=64, height=64, transparent=transparent)
        image = Image.open(io.BytesIO(draw(model, asked, quiet).file))
        assert image.mode == "RGBA"
        assert len(set(image.getchannel("A").tobytes())) > 1
    assert model_info(model).transparent


def test_a_model_without_alpha_refuses_transparency() -> None:
    model = loaded(tiny.stable_diffusion())
    with pytest.raises(InvalidRequest, match="opaque and auto are valid") as caught:
        draw(model, wanted(prompt="a cat", transparent=True), quiet)
    assert caught.value.param == "background"
    assert not model_info(model).transparent


# Tasks and facts


def test_siblings_are_those_that_diffusers_makes() -> None:
    from diffusers.pipelines import auto_pipeline as auto

    mappings = {"image": auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, "mask": auto.AUTO_INPAINT_PIPELINES_MAPPING}
    for task, mapping in mappings.items():
        for kind in auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
            made = auto._get_task_class(mapping, kind.__name__, throw_error_if_not_exist=False)
            ours = capabilities.task_class(kind.__name__, task, controlled=False)
            assert ours == (made.__name__ if made else None), kind.__name__
    assert capabilities.task_class("DDPMPipeline", "image", controlled=False) is None


EVERY = ("text-to-image", "image-to-image", "inpainting")
KNOWN: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd": (tiny.stable_diffusion, {"tasks": EVERY, "width": 64, "steps": 30, "guidance_scale": 8.0}),
    "inpaint": (tiny.inpaint_unet, {"tasks": ("image-to-image", "inpainting"), "width": None, "steps": 30}),
    "depth": (tiny.stable_diffusion_depth, {"tasks": ("image-to-image",), "width": None}),
    "xl": (tiny.stable_diffusion_xl, {"tasks": EVERY, "width": 64, "size_multiple": 8, "prompt_tokens": 77}),
    "sd3": (tiny.stable_diffusion_3, {"tasks": EVERY, "steps": 28, "guidance_scale": 7.0, "prompt_tokens": 256}),
    "flux": (tiny.flux, {"tasks": EVERY, "width": 1024, "size_multiple": 16, "steps": 28, "prompt_tokens": 512}),
    "pixart": (tiny.pixart, {"tasks": ("text-to-image",), "width": 256, "steps": 20, "prompt_tokens": 300}),
    "ddpm": (tiny.ddpm, {"tasks": ("text-to-image",), "width": 16, "guidance_scale": None, "prompt_tokens": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_facts_of(name: str) -> None:
    build, expected = KNOWN[name]
    known = model_info(loaded(build()))
    assert {field: getattr(known.sampling if field in NAMED else known, field) for field in expected} == expected
    assert known.sampling.height == known.sampling.width
    assert (known.device, known.dtype, known.upscale) == ("cpu", "fp32", None)


def test_facts_of_the_embedded_model_are_what_it_does() -> None:
    model = load(Catalog([EMBEDDED]).get("sfumato-tiny"), "cpu", quiet)
    known = model_info(model)
    done = draw(model, Generation(id="1", prompt="a cat", seed=1), quiet)
    recipe = done.recipe
    unset = {"eta": 0.0, "guidance_rescale": 0.0}  # a recipe has them only if they were set
    assert flat(known.sampling) | {"scheduler": None} == flat(recipe.sampling) | {"scheduler": None} | unset
    assert known.pipeline == recipe.pipeline


def test_facts_follow_the_model_file(tmp_path: Path) -> None:
    folder = tiny.save(tiny.stable_diffusion(), tmp_path / "sd")
    told: list[ModelStatus] = []
    pool = loads.pool(2, lambda model, status: told.append(status), describe=model_info)
    first = ModelConfig(name="m", model=str(folder), dtype="fp32", sampling=Sampling(steps=7))
    models = []
    for config in (first, first, replace(first, sampling=Sampling(steps=9, width=96, height=64))):
        with pool.use(config, loads.turn) as model:
            models.append(model)
    assert models[0] is models[1] is models[2]
    known = [status.info for status in told if status.state == "ready"]
    assert all(isinstance(each, ModelInfo) for each in known)
    assert [(each.sampling.steps, each.sampling.size) for each in known if each] == [(7, (64, 64)), (9, (96, 64))]
    assert pool.loads == 1


# Quality

QUALITY: list[tuple[dict[str, Any], dict[str, Any], int | None]] = [
    ({}, {}, 30),
    ({}, {"quality": "low"}, 15),
    ({}, {"quality": "hd"}, 45),
    ({}, {"quality": "auto"}, 30),
    ({}, {"quality": "low", "steps": 3}, 3),
    ({"steps": 1}, {"quality": "low"}, 1),
    ({"steps": 10, "quality_steps": (("low", 4),)}, {"quality": "low"}, 4),
    ({"steps": 10, "quality_steps": (("low", 4),)}, {"quality": "high"}, 15),
    ({"enable_parameters": frozenset(), "quality_steps": (("low", 4),)}, {"quality": "low"}, 30),
]


@pytest.mark.parametrize(("file", "request_", "steps"), QUALITY)
def test_quality_is_steps(file: dict[str, Any], request_: dict[str, Any], steps: int | None) -> None:
    model = loaded(_shared(tiny.stable_diffusion), **file)
    asked = wanted(**{"steps": None, **request_})
    assert arguments.fill(model, model.pipeline, asked).sampling.steps == steps


@pytest.mark.parametrize(
    ("build", "quality", "steps"),
    [(tiny.stable_diffusion_3, "low", 14), (tiny.stable_diffusion_3, None, 28), (tiny.flux, "max", 84)],
)
def test_quality_of_classes_with_their_own_default(build: Callable[[], Any], quality: str | None, steps: int) -> None:
    model = loaded(_shared(build))
    filled = arguments.fill(model, model.pipeline, wanted(steps=None, quality=quality)).sampling.steps
    assert (filled or arguments.defaults(model, model.pipeline).steps) == steps


def test_quality_of_a_class_without_steps_changes_nothing() -> None:
    class Turbo(diffusers.StableDiffusionPipeline):
        def __call__(self, prompt: str, generator: Any = None) -> Any:
            return super().__call__(prompt, num_inference_steps=2, generator=generator, width=64, height=64)

    pipe = Turbo(**tiny.stable_diffusion().components, requires_safety_checker=False)
    model = loaded(pipe, enable_parameters=frozenset({"num_inference_steps"}))
    plain = draw(model, wanted(prompt="a cat", steps=None), quiet)
    high = draw(model, wanted(prompt="a cat", steps=None, quality="high"), quiet)
    assert np.array_equal(np.asarray(decoded(plain.file)), np.asarray(decoded(high.file)))
    assert model_info(model).sampling.steps is None


@functools.cache
def _shared(build: Callable[[], Any]) -> Any:
    return build()


def test_a_model_that_cannot_be_described_draws_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Loaded) -> ModelInfo:
        raise AttributeError("no such part")

    folder = tiny.save(tiny.stable_diffusion(), tmp_path / "sd")
    told: list[ModelStatus] = []
    pool = loads.pool(1, lambda model, status: told.append(status), describe=fail)
    with pool.use(ModelConfig(name="m", model=str(folder), dtype="fp32"), loads.turn) as model:
        assert draw(model, wanted(prompt="a cat", width=64, height=64), quiet).file
    assert told[-1] == ModelStatus("ready")
