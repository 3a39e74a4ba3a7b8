"""Observe the denoising steps of a run: progress, previews, and whether the result is finite."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from sfumato.batching import views
from sfumato.batching.guidance import Interval
from sfumato.errors import DrawError
from sfumato.pictures.results import MADE_NAN
from sfumato.pipelines import capabilities, scheduler_owners, scheduler_steps
from sfumato.previews.steps import RunPreviews
from sfumato.previews.x0 import StepResult

OnStep: TypeAlias = Callable[[int, int], None]
"""Called after each denoising step with (steps done, total steps); may raise to stop the run."""

ENDED = frozenset({"DDPMWuerstchenScheduler"})
"""Schedulers whose last time step marks the end of the schedule and is not a step."""


class Finite:
    """Whether the latents that a run ends with are finite, and what is decoded from them; raises DrawError if not.

    On a CPU latents are checked at once. An accelerator computes that while the host goes on, and says it after the
    run.
    """

    def __init__(self) -> None:
        self._flags: list[torch.Tensor] = []
        self._decoded: list[torch.Tensor] = []

    def watch_decoded(self, pipeline: Any) -> None:
        """Look at what the image processor of `pipeline`, a view, makes pictures of: it would draw NaN as black."""
        processor: Any = getattr(pipeline, "image_processor", None)
        if not hasattr(processor, "postprocess"):
            return

        def postprocess(image: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(image, torch.Tensor):
                self._decoded.append(torch.isfinite(image).all())
            return processor.postprocess(image, *args, **kwargs)

        pipeline.image_processor = copy.copy(processor)
        pipeline.image_processor.postprocess = postprocess

    def note(self, result: Any) -> None:
        """The result of a scheduler's last step."""
        latents = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        if not isinstance(latents, torch.Tensor):
            return
        self._flags.append(torch.isfinite(latents).all())
        if latents.device.type == "cpu":
            self.check()

    def check(self) -> None:
        if not all(bool(flag) for flag in self._flags):
            raise DrawError(
                "the model drew NaN: its numbers left the range of its dtype. "
                "Set `dtype: bf16` or `dtype: fp32` in the model file, or lower the guidance scale."
            )
        if not all(bool(flag) for flag in self._decoded):
            raise DrawError(MADE_NAN)


def watch(
    pipeline: Any,
    kwargs: Mapping[str, Any],
    on_step: OnStep,
    previews: RunPreviews | None,
    interval: Interval | None = None,
) -> Finite:
    """Report the steps of every scheduler used in `pipeline`, with previews for the one that draws the picture.

    `kwargs`: the arguments that the pipeline will be called with. `interval`: is told of that one's steps, too. Check
    what it returns after the run.
    """
    drivers = scheduler_owners.drivers(pipeline)
    parameters = capabilities.parameters_of(pipeline)
    expected: dict[str, int] = {}
    for name in drivers:
        argument = name.replace("scheduler", "num_inference_steps")
        steps = kwargs.get(argument, parameters[argument].default if argument in parameters else None)
        expected[name] = steps if isinstance(steps, int) else 0
    progress, finite = scheduler_owners.StepCount(expected, on_step), Finite()
    finite.watch_decoded(scheduler_owners.drawing_pipeline(pipeline))
    if driver := drivers.get("scheduler"):
        views.expect(pipeline, functools.partial(_scheduled_of, weakref.ref(driver.scheduler), weakref.ref(pipeline)))
        if interval:
            interval.count = functools.partial(_remaining_of, weakref.ref(driver.scheduler))
    for name, driver in drivers.items():
        _observe(
            driver.scheduler,
            progress.of(name),
            finite,
            previews if name == "scheduler" else None,
            interval if name == "scheduler" else None,
        )
    return finite


def _observe(
    scheduler: Any,
    on_step: OnStep,
    finite: Finite,
    previews: RunPreviews | None,
    interval: Interval | None = None,
) -> None:
    """Report each `scheduler.step`: every denoising loop of diffusers calls it, with or without a callback."""
    done = total = 0
    first: Any = None

    def observed(scheduler: Any, step: Any, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done, total, first
        first = first or weakref.ref(scheduler)
        if first() is not scheduler:  # a copy that the pipeline steps in parallel, for audio
            return step(model_output, timestep, *args, **kwargs)
        if done == 0:
            total = _remaining(scheduler, timestep)
        result = step(model_output, timestep, *args, **kwargs)
        done += 1
        if interval:
            interval.stepped(done, max(done, total))
        on_step(done, max(done, total))
        if done >= total:
            finite.note(result)
        if previews:
            previews.after(done, total, StepResult(scheduler, model_output, timestep, result))
        return result

    scheduler_steps.wrap_step(scheduler, observed)


def _scheduled_of(reference: weakref.ref[Any], pipeline: weakref.ref[Any]) -> int:
    """Steps of the run that has begun. Image-to-image classes begin later, and round the strength in different ways."""
    scheduler = reference()
    if scheduler is None:
        return 0
    left = len(scheduler.timesteps) - (getattr(scheduler, "begin_index", None) or 0)
    # Solvers like DDIM have no such index: the class takes its part of the time steps, and says how many those are.
    return min(left, getattr(pipeline(), "num_timesteps", None) or left)


def _remaining_of(reference: weakref.ref[Any], first: Any) -> int:
    scheduler = reference()
    return 0 if scheduler is None else _remaining(scheduler, first)


def _remaining(scheduler: Any, first: Any) -> int:
    # Image-to-image starts in the middle of the schedule; second-order solvers name a time step twice
    # and start at its second entry.
    timesteps = torch.as_tensor(scheduler.timesteps).cpu()
    if type(scheduler).__name__ in ENDED:
        timesteps = timesteps[:-1]
    at = (timesteps == torch.as_tensor(first).cpu()).nonzero()
    return len(timesteps) - (int(at[-1, 0]) if len(at) else 0)
