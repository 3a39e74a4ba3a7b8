"""x0 prediction: a scheduler step's estimate of the clean sample, if available.

After a quarter of the steps the sample itself is mostly noise, but the x0 prediction is already a blurred picture.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import MappingProxyType
from typing import Any

import torch

CLEAN = ("pred_original_sample", "denoised")
"""Schedulers' names for their x0 prediction, if they return it."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """One completed call of `scheduler.step`."""

    scheduler: Any
    output: torch.Tensor
    """The denoiser's output."""
    timestep: Any
    result: Any
    """What the scheduler returned: a tuple or an object."""


def sample(stepped: Stepped) -> torch.Tensor | None:
    """The x0 prediction if it is returned or can be computed, else the next noisy sample."""
    result = stepped.result
    named: dict[str, Any]
    if isinstance(result, tuple):
        kind: Any = type(stepped.scheduler)
        named = dict(zip(_names(kind), result, strict=False)) | {"prev_sample": result[0]}
    else:
        named = vars(result)
    noisy = named.get("prev_sample")
    if not isinstance(noisy, torch.Tensor):
        return None
    guess = GUESSES.get(type(stepped.scheduler).__name__)
    clean = [*(named.get(name) for name in CLEAN), guess and guess(stepped, noisy)]
    return next((each for each in clean if isinstance(each, torch.Tensor) and each.shape == noisy.shape), noisy)


def _kept(stepped: Stepped, noisy: torch.Tensor) -> torch.Tensor | None:
    """Multistep solvers keep their latest x0 prediction but do not return it."""
    config = stepped.scheduler.config
    if not (config.get("predict_x0") or str(config.get("algorithm_type")).endswith("dpmsolver++")):
        return None
    return next(reversed(stepped.scheduler.model_outputs or ()), None)


def _straight(stepped: Stepped, noisy: torch.Tensor) -> torch.Tensor | None:
    """Flow matching: the denoiser predicts the direction from picture to noise; subtract it from `noisy`."""
    config, at = stepped.scheduler.config, stepped.scheduler.step_index
    if at is None or config.get("stochastic_sampling") or config.get("invert_sigmas"):
        return None
    sigma = float(stepped.scheduler.sigmas[at])
    return noisy.float() - sigma * stepped.output.float()


def _without_noise(stepped: Stepped, noisy: torch.Tensor) -> torch.Tensor | None:
    """PNDM: `noisy` minus the predicted noise."""
    scheduler = stepped.scheduler
    if scheduler.config.prediction_type != "epsilon":
        return None
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    # Its second call repeats the same step, but passes the time step that the first one led to.
    at = int(stepped.timestep) - (0 if scheduler.counter == 2 else stride)
    alpha = float(scheduler.alphas_cumprod[at] if at >= 0 else scheduler.final_alpha_cumprod)
    return (noisy.float() - math.sqrt(1 - alpha) * stepped.output.float()) / math.sqrt(alpha)


GUESSES: Mapping[str, Callable[[Stepped, torch.Tensor], torch.Tensor | None]] = MappingProxyType(
    {
        "DPMSolverMultistepScheduler": _kept,
        "DPMSolverSinglestepScheduler": _kept,
        "UniPCMultistepScheduler": _kept,
        "FlowMatchEulerDiscreteScheduler": _straight,
        "PNDMScheduler": _without_noise,
    }
)
"""How to compute the x0 prediction of schedulers that do not return it."""


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    """Names of the items in the tuple that a scheduler's `step` returns: the fields of its output class."""
    try:
        kinds = typing.get_args(typing.get_type_hints(kind.step)["return"])
    except (NameError, KeyError, TypeError):
        return ()
    return next((tuple(field.name for field in fields(each)) for each in kinds if is_dataclass(each)), ())
