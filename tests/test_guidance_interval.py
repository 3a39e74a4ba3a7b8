"""Guidance in a part of the steps: what diffusers draws so with all rows, from half of them outside.

The reference is diffusers' own: without guidance, and "dynamic guidance" by a callback that changes the scale and
halves the embeddings between two steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch

import sfumato.commands.generate as command
from sfumato.batching import views
from sfumato.batching.batcher import Batcher
from sfumato.batching.guidance import Interval
from sfumato.checkpoints import file_values
from sfumato.config import ModelConfig
from sfumato.core import Limits
from sfumato.drawing import two_passes
from sfumato.drawing.draw import draw
from sfumato.drawing.steps import watch
from sfumato.errors import InvalidRequest, ModelFileError
from sfumato.pictures.images import decoded
from sfumato.pipelines import guidance, modular, request_fields
from sfumato.sampling import Hires, Sampling
from sfumato.serving.planning import ImageRequest, plan
from support import families, families_controlled, families_newer, families_transformers, tiny
from support.drawing import loaded, quiet, source, wanted
from support.families import DEEP, Family, half_mask, over, with_pictures
from support.modular import BUILD

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some about toy sizes

EVERY = {
    **families.FAMILIES,
    **families_controlled.FAMILIES,
    **families_newer.FAMILIES,
    **families_transformers.FAMILIES,
}
SD3 = EVERY["StableDiffusion3"]
COMPARED: dict[str, Family] = {
    "StableDiffusion3Inpaint": Family(
        over(d.StableDiffusion3InpaintPipeline, tiny.stable_diffusion_3),
        [{**call, **DEEP, "mask_image": half_mask()} for call in with_pictures(SD3.calls)],
    ),
    **{
        name: family
        for name, family in EVERY.items()
        if f"{name.partition(' ')[0]}Pipeline" in guidance.CONCATENATING and "mixed" not in name
    },
}


def test_every_class_of_the_table_is_compared() -> None:
    assert {f"{name.partition(' ')[0]}Pipeline" for name in COMPARED} == guidance.CONCATENATING


def built(family: Family) -> Any:
    pipe = family.build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def strongly(family: Family) -> dict[str, Any]:
    """The call with a negative prompt, of a family that has one; guidance moves some toy models only a little."""
    return {**family.calls[1], "guidance_scale": 20.0}


def array(output: Any) -> np.ndarray[Any, Any]:
    images = output.images[0]
    return np.asarray(images, dtype=np.float32)


def of_diffusers(pipe: Any, call: dict[str, Any]) -> np.ndarray[Any, Any]:
    torch.manual_seed(1)  # the pipeline of Stable Diffusion 3's ControlNets draws noise without its generator
    return array(pipe(**call, generator=torch.Generator().manual_seed(1), output_type="np"))


def within(pipe: Any, call: dict[str, Any], interval: Interval) -> np.ndarray[Any, Any]:
    view = views.view(pipe)
    views.limit_guidance(view, interval)
    watch(view, call, quiet, None, interval)
    return of_diffusers(view, call)


@contextmanager
def counted(module: Any) -> Iterator[list[int]]:
    """The rows of each forward pass of `module`."""
    rows: list[int] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))))

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    yield rows
    hook.remove()


@pytest.mark.parametrize("name", COMPARED)
def test_without_a_step_inside_it_is_drawn_without_guidance(name: str) -> None:
    """So the second row is the one with the prompt, and every other module agrees.

    The reference has a scale of next to 1, which leaves that row, and draws as much noise as with guidance.
    """
    family = COMPARED[name]
    pipe = built(family)
    call = strongly(family)
    plain = of_diffusers(pipe, {**call, "guidance_scale": 1 + 1e-7})
    assert np.abs(of_diffusers(pipe, call) - plain).max() > 1e-4
    interval = Interval(0.0, 1e-3)
    nets = getattr(getattr(pipe, "controlnet", None), "nets", [getattr(pipe, "controlnet", torch.nn.Module())])
    with counted(getattr(pipe, family.denoiser)) as rows, counted(nets[0]) as of_net:
        drawn = within(pipe, call, interval)
    assert set(of_net) <= {1}
    np.testing.assert_allclose(drawn, plain, atol=1e-5)
    assert set(rows) == {1}
    assert interval.left_out >= len(rows)


def dynamic(pipe: Any, call: dict[str, Any], steps: int) -> np.ndarray[Any, Any]:
    """Guidance in the first `steps` of a run, as diffusers documents it."""

    def after(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step + 1 == steps:
            pipeline._guidance_scale = 1.0
            return {name: value[len(value) // 2 :] if len(value) > 1 else value for name, value in tensors.items()}
        return {}

    names = [name for name in type(pipe)._callback_tensor_inputs if not name.startswith("negative")]
    return of_diffusers(pipe, {**call, "callback_on_step_end": after, "callback_on_step_end_tensor_inputs": names})


DYNAMIC = (
    "StableDiffusion",
    "StableDiffusionXL",
    "StableDiffusion3",
    "StableDiffusionImg2Img",
    "StableDiffusionXLImg2Img",
    "StableDiffusionInpaint (9 channels)",
    "StableDiffusionXLInpaint",
    "StableDiffusionControlNet",
    "StableDiffusionXLControlNet",
)


@pytest.mark.parametrize("name", DYNAMIC)
def test_the_first_half_is_dynamic_guidance_of_diffusers(name: str) -> None:
    family = COMPARED[name]
    pipe = built(family)
    call = {**family.calls[1], "num_inference_steps": 6}
    with counted(getattr(pipe, family.denoiser)) as rows:
        drawn = within(pipe, call, Interval(0.0, 0.5))
    inside = rows.count(2)
    assert rows == [2] * inside + [1] * (len(rows) - inside)
    assert inside == len(rows) // 2 > 0
    expected = dynamic(pipe, call, inside)
    assert np.abs(expected - of_diffusers(pipe, call)).max() > 1e-4
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def within_by_hand(pipe: Any, denoiser: str, call: dict[str, Any], inside: range) -> np.ndarray[Any, Any]:
    """With all rows computed in every step, and the second one in place of both outside."""
    done = 0

    def put(module: Any, args: Any, output: Any) -> Any:
        nonlocal done
        done += 1
        sample = output[0]
        return output if done - 1 in inside else (torch.cat([sample[1:], sample[1:]]),)

    hook = getattr(pipe, denoiser).register_forward_hook(put)
    try:
        return of_diffusers(pipe, call)
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusion",
        "PixArtSigma",
        "HunyuanDiT",
        "StableDiffusionControlNet (guess mode)",
        "StableDiffusionXLControlNet (two)",
        "StableDiffusion (IP adapter)",
        "StableDiffusion3Img2Img",
        "StableDiffusion3ControlNet",
    ],
)
def test_an_interval_in_the_middle(name: str) -> None:
    family = COMPARED[name]
    pipe = built(family)
    call = {**family.calls[1], "num_inference_steps": 5}
    if type(pipe.scheduler) is d.PNDMScheduler:  # it repeats a step
        pipe.scheduler = d.DDIMScheduler.from_config(pipe.scheduler.config)
    steps = int(5 * call.get("strength", 1.0))
    inside = range(int(0.4 * steps), int(0.8 * steps))
    with counted(getattr(pipe, family.denoiser)) as rows:
        drawn = within(pipe, call, Interval(0.4, 0.8))
    assert rows == [2 if step in inside else 1 for step in range(steps)]
    np.testing.assert_allclose(drawn, within_by_hand(pipe, family.denoiser, call, inside), atol=1e-5)


def test_steps_of_a_second_order_scheduler_are_calls() -> None:
    pipe = built(COMPARED["StableDiffusion"])
    pipe.scheduler = d.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    call = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 3.0}
    with counted(pipe.unet) as rows:
        drawn = within(pipe, call, Interval(0.5, 1.0))
    assert rows == [1, 1, 1, 2, 2, 2, 2]  # 2 * 4 - 1
    np.testing.assert_allclose(drawn, within_by_hand(pipe, "unet", call, range(3, 7)), atol=1e-5)


def test_what_cannot_be_described_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = built(COMPARED["StableDiffusion"])
    call = strongly(COMPARED["StableDiffusion"])
    expected = within(pipe, call, Interval(0.0, 0.5))
    pipe.unet.forward = functools.partial(pipe.unet.forward)  # not the method of its class, and takes any arguments
    marked = {**call, "cross_attention_kwargs": {"of": object()}}
    with counted(pipe.unet) as rows:
        drawn = within(pipe, marked, Interval(0.0, 0.5))
    assert set(rows) == {2}
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_neighbours_with_other_intervals_share_forward_passes() -> None:
    """And each is the picture that it is alone."""
    pipe = built(COMPARED["StableDiffusion"])
    calls = COMPARED["StableDiffusion"].calls
    intervals = [(0.0, 0.5), (0.5, 1.0), (0.3, 0.7)]
    alone = [within(pipe, call, Interval(*each)) for call, each in zip(calls, intervals, strict=True)]
    batcher = Batcher()
    tasks = [
        batcher.submit(functools.partial(within, pipe, call, Interval(*each)))
        for call, each in zip(calls, intervals, strict=True)
    ]
    with torch.no_grad():
        while batcher.step():
            pass
    for task, expected in zip(tasks, alone, strict=True):
        assert task.outcome is not None
        np.testing.assert_allclose(task.outcome.value, expected, atol=1e-5)
    counts = batcher.counts["unet"]
    assert counts.forwards < counts.calls


# What requests and model files say


def pixels(done: Any) -> np.ndarray[Any, Any]:
    return np.asarray(decoded(done.file)).astype(int)


def drawn_of(model: Any, **fields: Any) -> Any:
    return draw(
        model,
        wanted(**{"prompt": "a cat", "steps": 4, "width": 64, "height": 64, "guidance_scale": 30.0, **fields}),
        quiet,
    )


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny.stable_diffusion()


def test_a_request_and_a_model_file(sd: Any) -> None:
    model = loaded(sd)
    whole, half = drawn_of(model, scheduler="euler"), drawn_of(model, scheduler="euler", guidance_end=0.5)
    assert np.abs(pixels(whole) - pixels(half)).max() > 1
    assert half.warnings == ()
    assert (half.recipe.sampling.guided, whole.recipe.sampling.guidance_end) == ((0.0, 0.5), None)
    like = replace(wanted(prompt="a cat"), sampling=command._as_request(half.recipe)["sampling"])
    again = draw(model, like, quiet)
    assert np.array_equal(pixels(again), pixels(half))
    by_file = drawn_of(loaded(sd, guidance_end=0.5), scheduler="euler")
    assert np.array_equal(pixels(by_file), pixels(half))
    other = drawn_of(loaded(sd, guidance_end=0.5), scheduler="euler", guidance_end=1.0)
    assert np.array_equal(pixels(other), pixels(whole))
    assert {"guidance_start", "guidance_end"} <= set(request_fields.of(sd))


def test_an_interval_without_effect_is_told(sd: Any) -> None:
    model = loaded(sd)
    unguided = drawn_of(model, guidance_scale=1.0, guidance_start=0.5)
    assert unguided.warnings == (
        "guidance_start 0.5, guidance_end 1: no effect, the picture is drawn without guidance",
    )
    covered = drawn_of(model, scheduler="euler", guidance_start=0.2)
    assert covered.warnings == ("guidance_start 0.2, guidance_end 1: no effect, it covers every step",)
    narrow = drawn_of(model, scheduler="euler", guidance_end=0.2)
    steps = narrow.recipe.sampling.steps
    assert narrow.warnings == (f"guidance_start 0, guidance_end 0.2: no step of {steps} lies between them",)


def test_both_passes_of_hires_are_limited(sd: Any) -> None:
    hires = Hires(upscaler="Lanczos", sampling=Sampling(width=96, height=96, strength=0.5, steps=8))
    request = wanted(
        prompt="a cat",
        steps=4,
        width=64,
        height=64,
        scheduler="euler",
        guidance_end=0.5,
        guidance_scale=8.0,
        hires=hires,
    )
    with counted(sd.unet) as rows:
        done = two_passes.picture(loaded(sd), request, quiet)
    assert rows == [2, 2, 1, 1] * 2
    assert done.recipe.hires.sampling.guided == (0.0, 0.5)


def test_image_to_image_counts_the_steps_that_it_runs(sd: Any) -> None:
    model = loaded(sd)
    fields = {"images": (source(64, 64),), "strength": 0.5, "steps": 8, "scheduler": "euler", "width": None}
    with counted(sd.unet) as rows:
        drawn_of(model, **fields, height=None, guidance_start=0.5)
    assert rows == [1, 1, 2, 2]


@pytest.mark.parametrize("name", guidance.FIELDS)
def test_a_class_that_cannot_is_refused(name: str) -> None:
    pipe = tiny.flux()
    words = f"^{name}: 0.5; the guidance of FluxPipeline cannot be limited to a part of the steps: .* Leave it out"
    with pytest.raises(InvalidRequest, match=words) as caught:
        drawn_of(loaded(pipe), **{name: 0.5})
    assert caught.value.param == name
    with pytest.raises(ModelFileError, match=words) as of_file:
        drawn_of(loaded(pipe, **{name: 0.5}))
    assert of_file.value.param == name
    left_out = drawn_of(loaded(pipe), **{name: 0.5}, webui=True)
    assert [warning.partition(":")[0] for warning in left_out.warnings] == [name]
    assert drawn_of(loaded(pipe), guidance_start=0.0, guidance_end=1.0).warnings == ()
    assert name not in request_fields.of(pipe)


def test_an_interval_without_any_step_is_refused(sd: Any) -> None:
    request = ImageRequest(prompts=["a"], sampling=Sampling(guidance_start=0.6, guidance_end=0.4))
    with pytest.raises(InvalidRequest, match=r"^guidance_start 0.6 is not before guidance_end 0.4") as caught:
        plan(request, ModelConfig(name="m", model="m"), Limits(2048 * 2048, 4096, 8), 1)
    assert caught.value.param == "guidance_start"
    with pytest.raises(InvalidRequest, match=r"0.6 is not before guidance_end 0.4") as of_both:
        drawn_of(loaded(sd, guidance_start=0.6), guidance_end=0.4)
    assert type(of_both.value) is InvalidRequest  # the request decides it
    with pytest.raises(ModelFileError, match="guidance_start"):
        drawn_of(loaded(sd, guidance_start=0.6, guidance_end=0.4))


def test_check_tells_of_a_model_file_that_cannot() -> None:
    def told(name: str, **fields: float) -> list[str]:
        config = ModelConfig(name="m", model="m", sampling=Sampling(**fields))
        return list(file_values.problems(config, name, {}, None))

    assert told("StableDiffusionPipeline", guidance_start=0.2, guidance_end=0.8) == []
    assert told("FluxPipeline", guidance_start=0.0, guidance_end=1.0) == []
    (flux,) = told("FluxPipeline", guidance_end=0.8)
    assert flux.startswith("guidance_end: 0.8: the guidance of FluxPipeline cannot be limited")
    (empty,) = told("StableDiffusionPipeline", guidance_start=0.8, guidance_end=0.2)
    assert empty.startswith("guidance_start: ")


def test_a_modular_pipeline_is_limited_by_its_guider() -> None:
    pipe = modular.adapted(BUILD["StableDiffusionXL"]())
    model = loaded(pipe)
    fields = {"steps": 4, "guidance_scale": 8.0, "width": 64, "height": 64, "prompt": "a cat"}
    with counted(pipe.unet) as whole:
        drawn_of(model, **fields)
    with counted(pipe.unet) as limited:
        half = drawn_of(model, **fields, guidance_start=0.25, guidance_end=0.75)
    assert (len(whole), len(limited)) == (8, 6)
    expected = drawn_of(loaded(pipe, option_lines=(("start", "0.25"), ("stop", "0.75"))), **fields)
    assert np.array_equal(pixels(half), pixels(expected))
    assert half.recipe.sampling.guided == (0.25, 0.75)
