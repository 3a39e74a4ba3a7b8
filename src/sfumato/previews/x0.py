"""What the picture will be, by a scheduler's step: its guess at the clean sample, where there is one.

After a quarter of the steps the sample itself is mostly noise; the guess is a blurred picture already.
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
"""What schedulers call their guess, if they return it."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """One call of `scheduler.step` that has returned."""

    scheduler: Any
    output: torch.Tensor
    """Of the denoiser."""
    timestep: Any
    result: Any
    """What the scheduler returned: a tuple or an object."""


def sample(stepped: Stepped) -> torch.Tensor | None:
    """The predicted clean sample if it is there or can be had, else the next noisy one."""
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
    """Multistep solvers keep their newest guess and do not return it."""
    config = stepped.scheduler.config
    if not (config.get("predict_x0") or str(config.get("algorithm_type")).endswith("dpmsolver++")):
        return None
    return next(reversed(stepped.scheduler.model_outputs or ()), None)


def _straight(stepped: Stepped, noisy: torch.Tensor) -> torch.Tensor | None:
    """Flow matching: the denoiser points from the picture to the noise, and `noisy` has gone some of the way back."""
    config, at = stepped.scheduler.config, stepped.scheduler.step_index
    if at is None or config.get("stochastic_sampling") or config.get("invert_sigmas"):
        return None
    sigma = float(stepped.scheduler.sigmas[at])
    return noisy.float() - sigma * stepped.output.float()


def _without_noise(stepped: Stepped, noisy: torch.Tensor) -> torch.Tensor | None:
    """PNDM: `noisy` less the noise that the denoiser has found in it."""
    scheduler = stepped.scheduler
    if scheduler.config.prediction_type != "epsilon":
        return None
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    # Its second call is for the same step again, and names the step that the first has led to.
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
"""How to have the guess of schedulers that do not return it."""


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    """Names of what the tuple has that a scheduler's `step` returns: those of the class it returns otherwise."""
    try:
        kinds = typing.get_args(typing.get_type_hints(kind.step)["return"])
    except (NameError, KeyError, TypeError):
        return ()
    return next((tuple(field.name for field in fields(each)) for each in kinds if is_dataclass(each)), ())
