"""Pipelines around pipelines: the scheduler of a call, steps and previews, where somebody inside drives them."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.core import Preview
from sfumato.drawing.draw import draw
from sfumato.pipelines import scheduler_owners
from support import families_newer
from support.drawing import loaded, wanted

CASCADE = {"height": 128, "width": 128}
KANDINSKY = {"height": 64, "width": 64}


def kandinsky() -> Any:
    pipe = families_newer.kandinsky_combined()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cascade() -> Any:
    pipe = families_newer.cascade()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def others(pipe: Any) -> list[Any]:
    """Two schedulers that draw otherwise than the pipeline's own."""
    own = pipe.scheduler
    if isinstance(own, diffusers.DDPMWuerstchenScheduler):
        return [diffusers.DDPMWuerstchenScheduler(scaler=scaler) for scaler in (0.5, 2.0)]
    return [kind.from_config(own.config) for kind in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler)]


COMBINED = pytest.mark.parametrize(("build", "size"), [(kandinsky, KANDINSKY), (cascade, CASCADE)])


@pytest.mark.filterwarnings("ignore")
@COMBINED
def test_the_scheduler_of_a_call_goes_where_the_picture_is_drawn(
    build: Callable[[], Any], size: dict[str, int]
) -> None:
    pipe = build()
    call = {"prompt": "a cat", "num_inference_steps": 3, "prior_num_inference_steps": 2, "output_type": "np", **size}

    def seeded(**more: Any) -> dict[str, Any]:
        return {**call, "generator": torch.Generator().manual_seed(1), **more}

    expected = [pipe(**seeded()).images]
    for scheduler in others(pipe):
        own, pipe.decoder_pipe.scheduler = pipe.decoder_pipe.scheduler, copy.deepcopy(scheduler)
        expected.append(pipe(**seeded()).images)
        pipe.decoder_pipe.scheduler = own
    found = sfumato.gather(pipe, [seeded(), *(seeded(scheduler=each) for each in others(pipe))])
    for one, output in zip(expected, found, strict=True):
        # On the mean: its decoder rounds to a codebook, and a rounding error may move a pixel.
        assert np.abs(output.images - one).mean() < 5e-4
    assert np.abs(expected[0] - expected[1]).mean() > 2e-3
    assert np.abs(expected[1] - expected[2]).mean() > 2e-3
    assert pipe.scheduler is pipe.decoder_pipe.scheduler


class Bare(diffusers.DiffusionPipeline):
    def __call__(self, prompt: str, generator: Any = None) -> Any:
        raise AssertionError("nothing may run")


class Cascaded(Bare):
    """As unCLIP: several schedulers, none of which is the one."""

    def __init__(self, prior_scheduler: Any, decoder_scheduler: Any) -> None:
        super().__init__()
        self.register_modules(prior_scheduler=prior_scheduler, decoder_scheduler=decoder_scheduler)


def test_where_there_is_no_one_place_for_it_the_call_is_refused() -> None:
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match=r"call 1: Bare has no single scheduler .*it has none.* Leave `scheduler` out"):
        sfumato.gather(Bare(), [{"prompt": "a"}, {"prompt": "a", "scheduler": scheduler}])
    pipe = Cascaded(diffusers.DDIMScheduler(), diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match=r"call 0: Cascaded .*decoder_scheduler, prior_scheduler; set that on"):
        sfumato.gather(pipe, [{"prompt": "a", "scheduler": scheduler}])


def test_schedulers_are_found_by_who_steps_them() -> None:
    pipe = kandinsky()
    assert scheduler_owners.drawing_pipeline(pipe) is pipe.decoder_pipe
    found = {name: driver.pipeline for name, driver in scheduler_owners.drivers(pipe).items()}
    assert found == {"prior_scheduler": pipe.prior_pipe, "scheduler": pipe.decoder_pipe}
    plain = pipe.decoder_pipe
    assert scheduler_owners.drawing_pipeline(plain) is plain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "size", "before"), [(kandinsky, KANDINSKY, 25), (cascade, CASCADE, 60)], ids=["kandinsky", "cascade"]
)
def test_steps_and_previews_of_all_that_draws(build: Callable[[], Any], size: dict[str, int], before: int) -> None:
    model = loaded(build())
    steps: list[tuple[int, int]] = []
    shown: list[Preview] = []
    done = draw(model, wanted(prompt="a cat", steps=4, previews=2, **size), lambda *at: steps.append(at), shown.append)
    total = before + 4
    assert steps == [(at, total) for at in range(1, total + 1)]
    assert [preview.index for preview in shown] == [0, 1]
    last = np.asarray(Image.open(io.BytesIO(done.file)).convert("RGB"), np.float32)
    for preview in shown:
        picture = Image.open(io.BytesIO(preview.png))
        assert (picture.mode, picture.size) == ("RGB", (size["width"], size["height"]))
    # The later preview is nearer to what comes of it.
    far, near = (np.abs(np.asarray(Image.open(io.BytesIO(each.png)), np.float32) - last).mean() for each in shown)
    assert near < far


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_over_leaves_nothing_behind() -> None:
    model = loaded(kandinsky())
    made: list[Any] = []
    before = {id(each) for each in gc.get_objects() if isinstance(each, diffusers.UnCLIPScheduler)}

    def note(*at: int) -> None:
        if not made:
            found = [each for each in gc.get_objects() if isinstance(each, diffusers.UnCLIPScheduler)]
            made.extend(weakref.ref(each) for each in found if id(each) not in before)

    draw(model, wanted(prompt="a cat", steps=2, **KANDINSKY), note)
    assert made
    gc.collect()
    assert not any(each() for each in made)


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_of_the_request_draws_the_picture() -> None:
    model = loaded(kandinsky())
    plain = draw(model, wanted(prompt="a cat", steps=3, **KANDINSKY), lambda *at: None)
    other = draw(model, wanted(prompt="a cat", steps=3, scheduler="ddim", **KANDINSKY), lambda *at: None)
    assert other.recipe.sampling.scheduler == "ddim"
    assert plain.file != other.file
