"""`sfumato.gather` on tiny real pipelines: what each call gives alone, it gives together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
)
from PIL import Image

import sfumato
from sfumato.batching.batcher import Batcher
from sfumato.batching.interruption import Slices
from sfumato.batching.views import view
from support import tiny
from support.gathered import MIXED, SQUARE, Calls, alone, check, seeded


def picture(seed: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def half_mask() -> Image.Image:
    return Image.fromarray((np.arange(64 * 64).reshape(64, 64) % 64 > 31).astype(np.uint8) * 255)


def with_pictures(calls: Calls, **more: Any) -> Calls:
    return [{**call, "image": picture(seed), **more} for seed, call in enumerate(calls[:3])]


def image_to_image() -> Any:
    return StableDiffusionImg2ImgPipeline(**tiny.stable_diffusion().components, requires_safety_checker=False)


FAMILIES: dict[str, tuple[Callable[[], Any], Calls]] = {
    "stable diffusion": (tiny.stable_diffusion, MIXED),
    "image to image": (image_to_image, with_pictures(MIXED, strength=0.8)),
    "inpainting": (tiny.inpaint_unet, with_pictures(MIXED, mask_image=half_mask(), **SQUARE)),
    "depth": (tiny.stable_diffusion_depth, with_pictures(MIXED)),
    "xl": (tiny.stable_diffusion_xl, [{**call, **SQUARE} for call in MIXED]),
    "flux": (tiny.flux, [{**call, **SQUARE, "negative_prompt": None} for call in MIXED]),
    "stable diffusion 3": (tiny.stable_diffusion_3, [{**call, **SQUARE} for call in MIXED]),
    "pixart": (tiny.pixart, [{**call, **SQUARE, "use_resolution_binning": False} for call in MIXED]),
    "ddpm": (tiny.ddpm, [{"num_inference_steps": steps} for steps in (2, 5, 3)]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_together_equals_alone(family: str) -> None:
    build, calls = FAMILIES[family]
    stats = check(build(), calls)
    denoiser = stats.get("unet") or stats["transformer"]
    assert denoiser["mean_batch"] > 1.5
    assert denoiser["mean_batch"] == denoiser["calls"] / denoiser["forwards"]


def test_sizes_differ() -> None:
    calls = [{**MIXED[0], "height": side, "width": 64} for side in (64, 96, 64, 96)]
    stats = check(tiny.stable_diffusion(), calls)
    assert stats["unet"]["mean_batch"] > 1.5


def test_each_call_may_have_its_own_scheduler() -> None:
    pipe = tiny.stable_diffusion()
    kinds = [DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler]
    schedulers = [kind.from_config(pipe.scheduler.config) for kind in kinds]
    calls = [{"prompt": kind.__name__, "num_inference_steps": 4} for kind in kinds]
    own = pipe.scheduler
    expected = []
    for scheduler, call in zip(schedulers, seeded(calls), strict=True):
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        expected.append(pipe(**call).images)
    pipe.scheduler = own
    stats: dict[str, dict[str, float]] = {}
    together = [{**call, "scheduler": s} for call, s in zip(seeded(calls), schedulers, strict=True)]
    for one, other in zip(expected, sfumato.gather(pipe, together, stats=stats), strict=True):
        np.testing.assert_allclose(other.images, one, atol=1e-4)
    assert stats["unet"]["mean_batch"] > 2.5


@pytest.mark.parametrize("max_batch", [1, 2, 3, 16])
def test_no_forward_is_larger_than_asked(max_batch: int) -> None:
    pipe = tiny.stable_diffusion()
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])) if args else None)
    keyword = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["sample"])) if "sample" in kwargs else None,
        with_kwargs=True,
    )
    sfumato.gather(pipe, seeded(MIXED[:3]), max_batch=max_batch)
    hook.remove()
    keyword.remove()
    assert max(seen) <= max(2, max_batch)


def test_the_pipeline_stays_as_it_was() -> None:
    pipe = tiny.stable_diffusion()
    before = alone(pipe, MIXED[:1])
    state = {name: id(value) for name, value in vars(pipe).items()}
    weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    forward = pipe.unet.forward
    timesteps = pipe.scheduler.timesteps.clone()
    config = dict(pipe.scheduler.config)
    sfumato.gather(pipe, seeded(MIXED))
    assert {name: id(value) for name, value in vars(pipe).items()} == state
    assert forward == pipe.unet.forward
    assert torch.equal(pipe.scheduler.timesteps, timesteps)
    assert dict(pipe.scheduler.config) == config
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, weights[name])
    np.testing.assert_array_equal(alone(pipe, MIXED[:1])[0], before[0])


def test_the_first_error_ends_all() -> None:
    pipe = tiny.stable_diffusion()
    steps: list[int] = []

    def note(pipe: Any, step: int, *rest: Any) -> dict[str, Any]:
        steps.append(step)
        return {}

    calls = seeded(MIXED[:2])
    calls[1] |= {"num_inference_steps": 50, "callback_on_step_end": note}
    calls.append({"prompt": 5})
    with pytest.raises(ValueError, match="has to be of type"):
        sfumato.gather(pipe, calls)
    assert len(steps) < 5


def test_exceptions_may_be_returned() -> None:
    pipe = tiny.stable_diffusion()
    calls = [*MIXED[:2], {"prompt": 5}]
    expected = alone(pipe, calls[:2])
    first, second, error = sfumato.gather(pipe, seeded(calls), return_exceptions=True)
    np.testing.assert_allclose(first.images, expected[0], atol=1e-4)
    np.testing.assert_allclose(second.images, expected[1], atol=1e-4)
    assert isinstance(error, ValueError)


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize("turn", [0, 1, 2, 4, 6])
def test_cancelling_one_leaves_the_pixels_of_the_others(turn: int) -> None:
    pipe = tiny.stable_diffusion()
    expected = alone(pipe, MIXED[:3])
    batcher = Batcher()
    tasks = [batcher.submit(lambda call=call: view(pipe)(**call).images) for call in seeded(MIXED[:3])]
    with torch.no_grad():
        for _ in range(turn):
            batcher.step()
        batcher.cancel(tasks[1], Cancelled())
        while batcher.step():
            pass
    outcomes = [task.outcome for task in tasks]
    assert isinstance(outcomes[1].error, Cancelled)
    np.testing.assert_allclose(outcomes[0].value, expected[0], atol=1e-4)
    np.testing.assert_allclose(outcomes[2].value, expected[2], atol=1e-4)


def test_two_pipelines_on_the_same_weights_share_forwards() -> None:
    text = tiny.stable_diffusion()
    image = StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    text.set_progress_bar_config(disable=True)
    image.set_progress_bar_config(disable=True)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (text, {"prompt": "a", "num_inference_steps": 4}),
        (image, {"prompt": "b", "num_inference_steps": 4, "strength": 1.0, "image": picture(1)}),
    ]

    def run(pipe: Any, call: dict[str, Any]) -> Any:
        return view(pipe)(**call, generator=torch.Generator().manual_seed(1), output_type="np").images

    expected = [run(pipe, call) for pipe, call in calls]
    batcher = Batcher(slices=Slices(lambda: 0.0))  # an encode that a busy machine makes long would let the other go on
    tasks = [batcher.submit(lambda pipe=pipe, call=call: run(pipe, call)) for pipe, call in calls]
    with torch.no_grad():
        while batcher.step():
            pass
    for one, task in zip(expected, tasks, strict=True):
        np.testing.assert_allclose(task.outcome.value, one, atol=1e-4)
    assert batcher.counts["unet"].forwards < batcher.counts["unet"].calls


def test_an_exclusive_pipeline_runs_beside_others_and_leaves_nothing_behind() -> None:
    plain = tiny.stable_diffusion()
    parts = {name: part for name, part in plain.components.items() if name != "image_encoder"}
    guided = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers="mid")
    for pipe in (plain, guided):
        pipe.set_progress_bar_config(disable=True)
    calls = [(guided if n % 2 else plain, call) for n, call in enumerate(seeded(MIXED))]
    expected = [pipe(**call).images for pipe, call in calls]
    processors = dict(plain.unet.attn_processors)
    batcher = Batcher()
    again = [(pipe, call) for (pipe, _), call in zip(calls, seeded(MIXED), strict=True)]
    tasks = [batcher.submit(lambda pipe=pipe, call=call: view(pipe)(**call).images) for pipe, call in again]
    with torch.no_grad():
        while batcher.step():
            pass
    for one, task in zip(expected, tasks, strict=True):
        np.testing.assert_allclose(task.outcome.value, one, atol=1e-4)
    assert dict(plain.unet.attn_processors) == processors


def test_the_same_prompt_is_encoded_once() -> None:
    pipe = tiny.stable_diffusion()
    stats = check(pipe, [{"prompt": "the same", "num_inference_steps": steps} for steps in (2, 3, 4)])
    # The empty negative prompt and the prompt: two texts for six calls.
    assert stats["text_encoder"]["calls"] == 6
    assert stats["text_encoder"]["forwards"] == 2


def test_callbacks_see_their_own_call() -> None:
    pipe = tiny.stable_diffusion()
    seen: dict[int, list[int]] = {0: [], 1: []}
    calls = seeded(MIXED[:2])
    for number, call in enumerate(calls):

        def note(pipe: Any, step: int, time: Any, values: Any, number: int = number) -> dict[str, Any]:
            seen[number].append(step)
            return {}

        call["callback_on_step_end"] = note
    sfumato.gather(pipe, calls)
    assert seen == {0: list(range(4)), 1: list(range(6))}  # PNDM does one step more


def test_the_shared_generator_and_the_empty_batch_are_refused() -> None:
    pipe = tiny.stable_diffusion()
    generator = torch.Generator()
    with pytest.raises(ValueError, match="calls 0 and 1 share one generator"):
        sfumato.gather(pipe, [{"prompt": "a", "generator": generator}, {"prompt": "b", "generator": generator}])
    with pytest.raises(ValueError, match="max_batch=0"):
        sfumato.gather(pipe, [{"prompt": "a"}], max_batch=0)


def test_nothing_to_do() -> None:
    assert sfumato.gather(tiny.stable_diffusion(), []) == []


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sfumato, sys; print('torch' in sys.modules, callable(sfumato.gather), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_a_method_imported_first_does_not_hide_the_function() -> None:
    code = "from sfumato.batching.gather import gather; import sfumato; assert sfumato.gather is gather"
    subprocess.run([sys.executable, "-c", code], check=True)
