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

X0_NAMES = ("pred_original_sample", "denoised")
"""Schedulers' names for their x0 prediction, if they return it."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One completed call of `scheduler.step`."""

    scheduler: Any
    output: torch.Tensor
    """The denoiser's output."""
    timestep: Any
    result: Any
    """What the scheduler returned: a tuple or an object."""


def x0_or_sample(step_result: StepResult) -> torch.Tensor | None:
    """The x0 prediction if it is returned or can be computed, else the next noisy sample."""
    result = step_result.result
    values: dict[str, Any]
    if isinstance(result, tuple):
        kind: Any = type(step_result.scheduler)
        values = dict(zip(_names(kind), result, strict=False)) | {"prev_sample": result[0]}
    else:
        values = vars(result)
    noisy = values.get("prev_sample")
    if not isinstance(noisy, torch.Tensor):
        return None
    formula = X0_FORMULAS.get(type(step_result.scheduler).__name__)
    candidates = [*(values.get(name) for name in X0_NAMES), formula and formula(step_result, noisy)]
    return next((x0 for x0 in candidates if isinstance(x0, torch.Tensor) and x0.shape == noisy.shape), noisy)


def _from_solver_state(step_result: StepResult, noisy: torch.Tensor) -> torch.Tensor | None:
    """Multistep solvers keep their latest x0 prediction but do not return it."""
    config = step_result.scheduler.config
    if not (config.get("predict_x0") or str(config.get("algorithm_type")).endswith("dpmsolver++")):
        return None
    return next(reversed(step_result.scheduler.model_outputs or ()), None)


def _from_flow(step_result: StepResult, noisy: torch.Tensor) -> torch.Tensor | None:
    """Flow matching: the denoiser predicts the direction from picture to noise; subtract it from `noisy`."""
    config, at = step_result.scheduler.config, step_result.scheduler.step_index
    if at is None or config.get("stochastic_sampling") or config.get("invert_sigmas"):
        return None
    sigma = float(step_result.scheduler.sigmas[at])
    return noisy.float() - sigma * step_result.output.float()


def _from_epsilon(step_result: StepResult, noisy: torch.Tensor) -> torch.Tensor | None:
    """PNDM: `noisy` minus the predicted noise."""
    scheduler = step_result.scheduler
    if scheduler.config.prediction_type != "epsilon":
        return None
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    # Its second call repeats the same step, but passes the time step that the first one led to.
    at = int(step_result.timestep) - (0 if scheduler.counter == 2 else stride)
    alpha = float(scheduler.alphas_cumprod[at] if at >= 0 else scheduler.final_alpha_cumprod)
    return (noisy.float() - math.sqrt(1 - alpha) * step_result.output.float()) / math.sqrt(alpha)


X0_FORMULAS: Mapping[str, Callable[[StepResult, torch.Tensor], torch.Tensor | None]] = MappingProxyType(
    {
        "DPMSolverMultistepScheduler": _from_solver_state,
        "DPMSolverSinglestepScheduler": _from_solver_state,
        "UniPCMultistepScheduler": _from_solver_state,
        "FlowMatchEulerDiscreteScheduler": _from_flow,
        "PNDMScheduler": _from_epsilon,
    }
)
"""How to compute the x0 prediction of schedulers that do not return it."""


@functools.cache
def _names(scheduler_class: Any) -> tuple[str, ...]:
    """Names of the items in the tuple that a scheduler's `step` returns: the fields of its output class."""
    try:
        kinds = typing.get_args(typing.get_type_hints(scheduler_class.step)["return"])
    except (NameError, KeyError, TypeError):
        return ()
    return next((tuple(field.name for field in fields(kind)) for kind in kinds if is_dataclass(kind)), ())
