"""Create a scheduler for one request, to fit the pipeline that will draw it.

diffusers' schedulers hold the state of a run, so each request gets its own instance; the pipeline's
is read and never written. The request's scheduler takes over how the model was trained (`TRAINED_WITH`) and
what its authors set explicitly (`PREFERENCES`), but never the sampler's own switches: `euler` means
Euler without Karras sigmas, even on a model that ships with them.

Whether a solver fits a pipeline is checked before the first step: `scheduler_calls.read` reads what the
pipeline's code passes to its scheduler, and a rehearsal runs the new scheduler on that for a few
steps over an empty latent. The result is cached, so each combination is rehearsed once.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch

from sfumato import schedulers
from sfumato.errors import InvalidRequest, in_words
from sfumato.pipelines import scheduler_calls, scheduler_steps
from sfumato.pipelines.scheduler_calls import SchedulerUse
from sfumato.schedulers import SchedulerChoice, SolverForm

TRAINED_WITH = frozenset({
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "clip_sample", "clip_sample_range", "thresholding",
    "dynamic_thresholding_ratio", "sample_max_value", "variance_type", "original_inference_steps",
    "timestep_scaling", "timestep_type", "sigma_min", "sigma_max", "shift", "flow_shift",
    "use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len", "invert_sigmas", "shift_terminal", "stochastic_sampling", "scale_factors",
    "upscale_mode",
})  # fmt: skip
"""How the model was trained: applies to every solver, whether or not the model's config states it.

(diffusers' own `from_config` replaces a value that is not in the config with the new class's default.
The classes disagree on `beta_start`, for example.)
"""

PREFERENCES = frozenset({
    "timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "lambda_min_clipped",
    "interpolation_type",
})  # fmt: skip
"""Taken over only if the model's config states it, as in `from_config`."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "use_dynamic_shifting": (None, False),
    "invert_sigmas": (None, False),
    "shift_terminal": (None, 0),
    "scale_factors": (None,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
"""Facts that a solver may ignore at these values; for other values it must support them."""

SIGMA_FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

REHEARSAL_STEPS = 4
"""Steps of a rehearsal without a requested number, and of a schedule that is never used."""

CROWDED_STEPS = 100
"""From so many steps on, two may fall on one time step of the thousand that models are trained with."""

SLOW_CONSTRUCTORS = frozenset({
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler",
    "DPMSolverSDEScheduler",
})  # fmt: skip
"""Classes whose constructor computes a schedule of all training steps: 0.2 s per picture for DPM2.

The first `set_timesteps` replaces it.
"""


def make(pipeline: Any, choice: SchedulerChoice | None, seed: int | Sequence[int]) -> Any:
    """A fresh scheduler for one call of `pipeline`; without a choice, one like the model's own.

    `seed` determines the noise that a solver adds during the run, unless the pipeline passes its own
    generator to each step.
    To draw several pictures in one call, pass one seed per picture: each then equals the picture drawn alone.
    Returns None for a pipeline without a scheduler.
    """
    model_scheduler = getattr(pipeline, "scheduler", None)
    if choice is None:
        kind: Any = type(pipeline)
        return (
            None
            if model_scheduler is None
            else _with_generator(
                pipeline, _like_model(model_scheduler, seed, sets_steps=bool(scheduler_calls.read(kind))), seed
            )
        )
    form = _form(model_scheduler, choice)
    if form is None:
        raise _refusal(pipeline, choice, _why_no_form(model_scheduler, choice))
    return _with_generator(pipeline, _build(model_scheduler, form, seed), seed)


def check(pipeline: Any, choice: SchedulerChoice | None, count: int | None = None) -> None:
    """Raise InvalidRequest if `choice` cannot draw with `pipeline` (in `count` steps, if not None).

    None stands for the model's own scheduler, of which only the number of steps is checked.
    """
    model = _model(pipeline)
    if choice is None:
        if count is not None and (reason := _why_too_many(model, count)):
            raise InvalidRequest(
                f"step: {count}: the model's own scheduler cannot draw in so many: {reason}. It was trained with "
                f"{_trained_steps(model.scheduler)}; send fewer, or another scheduler.",
                param="step",
            )
        return
    if (reason := _why_unfit(model, choice.name, count)) is None:
        return
    if count is not None and _why_unfit(model, choice.name, None) is None:
        raise InvalidRequest(
            f"Scheduler {choice.name!r} cannot draw in {count} steps: {reason}. Use another number of steps.",
            param="step",
        )
    raise _refusal(pipeline, choice, reason)


def why_unfit(pipeline: Any, choice: SchedulerChoice, count: int | None = None) -> str | None:
    """Why `choice` cannot draw with `pipeline` (in `count` steps, if not None), in words; None if it can."""
    return _why_unfit(_model(pipeline), choice.name, count)


def keeps_own(pipeline: Any) -> str:
    """Why `pipeline` always draws with its own scheduler; empty if another one may replace it.

    It is unknown what such a pipeline passes to its scheduler, so no other scheduler can be checked.
    """
    kind: Any = type(pipeline)
    return scheduler_calls.unreadable(kind) if getattr(pipeline, "scheduler", None) is not None else ""


def works_with(pipeline: Any) -> tuple[str, ...]:
    """The names in `schedulers.names()` that `check` accepts."""
    model = _model(pipeline)
    return tuple(name for name in schedulers.names() if _why_unfit(model, name, None) is None)


def is_flow(scheduler: Any) -> bool:
    """Whether the model behind this scheduler predicts a flow."""
    return schedulers.is_flow(type(scheduler).__name__, getattr(scheduler, "config", {}))


def _form(model_scheduler: Any, choice: SchedulerChoice) -> SolverForm | None:
    """The form of the solver for the kind of model that `model_scheduler` belongs to."""
    return schedulers.form_for(choice, type(model_scheduler).__name__, getattr(model_scheduler, "config", {}))


def _why_no_form(model_scheduler: Any, choice: SchedulerChoice) -> str:
    if model_scheduler is None:
        return "this pipeline has no scheduler"
    return schedulers.why_no_form(choice, type(model_scheduler).__name__, getattr(model_scheduler, "config", {}))


def _like_model(model_scheduler: Any, seed: int | Sequence[int], *, sets_steps: bool) -> Any:
    if not isinstance(model_scheduler, diffusers.ConfigMixin):
        return copy.deepcopy(model_scheduler)
    # Not from_config: it treats a value that the pipeline corrected after loading as a default.
    kind: Any = type(model_scheduler)
    parameters = _parameters(kind)
    arguments = {key: value for key, value in model_scheduler.config.items() if key in parameters}
    return _construct(
        type(model_scheduler), arguments | _seeded(parameters, seed), model_scheduler.config, sets_steps=sets_steps
    )


def _build(model_scheduler: Any, form: SolverForm, seed: int | Sequence[int]) -> Any:
    cls = getattr(diffusers, form.cls)
    parameters = _parameters(cls)
    training_config = _training_config(model_scheduler)
    # Latents exceed -1 .. 1; clipping is only for models whose own scheduler does it.
    arguments: dict[str, Any] = {"clip_sample": False, **training_config}
    # The two families have different names for the same number.
    shift = training_config.get("shift", training_config.get("flow_shift", 1.0))
    arguments |= {"shift": shift, "flow_shift": shift}
    arguments |= dict.fromkeys(SIGMA_FLAGS, False)
    arguments |= form.arguments
    arguments = {key: value for key, value in arguments.items() if key in parameters}
    return _construct(cls, arguments | _seeded(parameters, seed), training_config)


def _training_config(model_scheduler: Any) -> dict[str, Any]:
    """Configuration that every scheduler for this model should have."""
    config = dict(model_scheduler.config)
    kind: Any = type(model_scheduler)
    parameters = _parameters(kind)
    unwritten = {
        key
        for key in config.get("_use_default_values", ())
        if key in parameters and config[key] == parameters[key].default
    }
    return {
        key: value
        for key, value in config.items()
        if key in TRAINED_WITH or (key in PREFERENCES and key not in unwritten)
    }


def _construct(cls: Any, arguments: Mapping[str, Any], config: Mapping[str, Any], *, sets_steps: bool = True) -> Any:
    """`sets_steps`: the caller sets the steps before anything else, as every pipeline does that `read` understands."""
    scheduler = _unscheduled(cls, arguments) if sets_steps else cls(**arguments)
    # Pipelines read settings from their scheduler's config that its class does not define (`max_shift`).
    rest = {key: value for key, value in config.items() if key not in scheduler.config and key[0] != "_"}
    scheduler.register_to_config(**rest)
    return scheduler


def _unscheduled(cls: Any, arguments: Mapping[str, Any]) -> Any:
    """`cls(**arguments)` without the initial schedule of all training steps that SLOW_CONSTRUCTORS compute."""
    if cls.__name__ not in SLOW_CONSTRUCTORS:
        return cls(**arguments)
    scheduler = cls.__new__(cls)

    def few(count: int, *args: Any, **kwargs: Any) -> None:
        cls.set_timesteps(scheduler, min(count, REHEARSAL_STEPS), *args, **kwargs)

    vars(scheduler)["set_timesteps"] = few
    cls.__init__(scheduler, **arguments)
    del vars(scheduler)["set_timesteps"]
    return scheduler


def _seeded(parameters: Mapping[str, inspect.Parameter], seed: int | Sequence[int]) -> dict[str, Any]:
    if "noise_sampler_seed" not in parameters:
        return {}
    return {"noise_sampler_seed": seed if isinstance(seed, int) else list(seed)}


def _with_generator(pipeline: Any, scheduler: Any, seed: int | Sequence[int]) -> Any:
    """`scheduler` with a generator for its steps, if the pipeline does not pass one.

    FLUX and similar ones do not: a solver that adds noise would draw it from torch's global state, and the
    seed would not determine the picture.
    """
    kind: Any = type(pipeline)
    usage = scheduler_calls.read(kind)
    if usage is None or usage.generator or "generator" not in _parameters(type(scheduler).step):
        return scheduler
    generator = noise(seed) if isinstance(seed, int) else [noise(picture_seed) for picture_seed in seed]
    scheduler_steps.set_generator(scheduler, generator)
    return scheduler


def noise(seed: int) -> torch.Generator:
    """Generator for the steps' noise; derived, as `seed` itself would repeat the initial latents."""
    derived = int(np.random.SeedSequence((seed, 1)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(derived % 2**63)


@functools.lru_cache(maxsize=256)  # for classes and their methods only: instances would be kept alive
def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _refusal(pipeline: Any, choice: SchedulerChoice, reason: str) -> InvalidRequest:
    model_scheduler = getattr(pipeline, "scheduler", None)
    fitting = works_with(pipeline)
    remedy = f"These work: {', '.join(fitting)}. Or leave" if fitting else "Leave"
    keep = f" to keep the model's own ({type(model_scheduler).__name__})" if model_scheduler is not None else ""
    return InvalidRequest(
        f"Scheduler {choice.name!r} does not work with {type(pipeline).__name__}: {reason}."
        f" {remedy} the scheduler out{keep}.",
        param="scheduler",
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """Everything that decides which schedulers fit a pipeline; equal for equivalent pipelines."""

    pipeline_class: Any
    """Class of the pipeline."""
    scheduler_class: Any
    """Class of its scheduler."""
    config: str
    """Its scheduler's whole configuration, as text."""
    scheduler: Any = field(compare=False)
    """Its scheduler; read-only."""


def _model(pipeline: Any) -> _Model:
    model_scheduler = getattr(pipeline, "scheduler", None)
    config = dict(getattr(model_scheduler, "config", None) or {})
    config["_use_default_values"] = sorted(config.get("_use_default_values", ()))
    return _Model(
        type(pipeline), type(model_scheduler), json.dumps(config, sort_keys=True, default=_plainly), model_scheduler
    )


def _plainly(value: Any) -> Any:
    """Serialise what JSON does not support: arrays as lists, the rest as `repr`."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


@functools.lru_cache(maxsize=4096)
def _why_unfit(model: _Model, name: str, count: int | None) -> str | None:
    """Why the scheduler of this name cannot draw with `model`, or None if it can."""
    model_scheduler, choice = model.scheduler, schedulers.parse(name)
    form = _form(model_scheduler, choice)
    if model_scheduler is None or form is None:
        return _why_no_form(model_scheduler, choice)
    usage = scheduler_calls.read(model.pipeline_class)
    if usage is None:
        return f"{model.pipeline_class.__name__} does not use a scheduler of its own"
    parameters = _parameters(getattr(diffusers, form.cls))
    for key, neutral in NEUTRAL.items():
        if model_scheduler.config.get(key) not in neutral and key not in parameters:
            return f"{form.cls} does not support the model's {key} ({in_words(model_scheduler.config[key])})"
    scheduler = _build(model_scheduler, form, seed=0)
    return _missing_support(scheduler, model_scheduler, usage) or _rehearse(scheduler, usage, count)


@functools.lru_cache(maxsize=256)
def _why_too_many(model: _Model, count: int) -> str | None:
    """Why the model's own scheduler cannot draw in as many steps as it was trained with; None if it can, or there are
    fewer."""
    usage = scheduler_calls.read(model.pipeline_class)
    if usage is None or count < _trained_steps(model.scheduler):
        return None

    def rehearsed(steps: int | None) -> str | None:
        # An error of diffusers' is certain. Whether a result is finite depends on the latents, and is seen at the end.
        return _rehearse(_like_model(model.scheduler, 0, sets_steps=True), usage, steps, errors_only=True)

    # What fails in any number of steps is not understood here, and may draw.
    return rehearsed(count) if rehearsed(None) is None else None


def _trained_steps(scheduler: Any) -> int:
    return int(getattr(scheduler, "config", {}).get("num_train_timesteps") or 1000)


def _missing_support(scheduler: Any, model_scheduler: Any, usage: SchedulerUse) -> str | None:
    """What the pipeline requires of its scheduler but this one lacks."""
    cls = type(scheduler).__name__
    for run in usage.runs:
        unknown = run.names(scheduler.config) - _parameters(type(scheduler).set_timesteps).keys()
        if unknown:
            return f"the pipeline sets {_joined(unknown)}, which {cls} does not take"
    unexpected = usage.step_arguments - _parameters(type(scheduler).step).keys()
    if unexpected:
        return f"the pipeline passes {_joined(unexpected)} to each step, which {cls} does not take"
    missing = {
        name for name in usage.uses - usage.guarded if name in dir(model_scheduler) and name not in dir(scheduler)
    }
    if missing:
        return f"the pipeline uses the scheduler's {_joined(missing)}, which {cls} does not have"
    return None


def _joined(names: Set[str]) -> str:
    return " and ".join(sorted(names))


def _rehearse(scheduler: Any, usage: SchedulerUse, count: int | None, *, errors_only: bool = False) -> str | None:
    """Run a few steps as the pipeline would, over an empty latent; returns why that fails, or None.

    Uses its own generator: a check must not consume other random numbers.
    """
    for run in usage.runs:
        try:
            _set(scheduler, run, count or REHEARSAL_STEPS)
            finite = _step(scheduler, usage, None if _may_fail_late(scheduler, count) else REHEARSAL_STEPS)
        # Whatever diffusers raises here, it would raise in the middle of a request.
        except Exception as error:
            return (
                f"{type(scheduler).__name__} fails with the arguments that the pipeline passes ({_error_text(error)})"
            )
        if not finite and not errors_only:
            return f"{type(scheduler).__name__} gives no finite result with this model's noise schedule"
        # Such a scheduler expects noise scaled up at the start and down again before each step.
        starts = {"init_noise_sigma", "add_noise"} & usage.uses
        scales = starts and "scale_model_input" in usage.uses
        if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0 and not scales:
            return f"the pipeline does not scale the noise as {type(scheduler).__name__} needs it"
    return None


def _may_fail_late(scheduler: Any, count: int | None) -> bool:
    """Whether the last step may fail where the first do not: with as many steps as the model was trained with, and
    where so many are asked for that two have one time step, of which a scheduler may begin at the second."""
    if count is None or count < CROWDED_STEPS:
        return False
    timesteps = torch.as_tensor(scheduler.timesteps).tolist()
    return count >= _trained_steps(scheduler) or len(set(timesteps)) < len(timesteps)


def _error_text(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__


def _set(scheduler: Any, run: scheduler_calls.SetStepsCall, count: int) -> None:
    levels = np.linspace(1.0, 1 / count, count)
    # `retrieve_timesteps` passes arrays; the few pipelines that call it directly pass lists.
    sigmas = levels if "sigmas" in run.optional else levels.tolist()
    values: dict[str, Any] = {"sigmas": sigmas, "timesteps": 1000 * levels, "mu": 0.8}
    passed = run.with_values(scheduler.config)
    arguments = {name: values.get(name) if name in passed else None for name in run.names(scheduler.config)}
    if not passed & {"sigmas", "timesteps"}:
        arguments["num_inference_steps"] = count
    scheduler.set_timesteps(device="cpu", **arguments)


def _step(scheduler: Any, usage: SchedulerUse, count: int | None) -> bool:
    """Whether the result of the first `count` steps (None: of all) is finite."""
    sample = torch.zeros(1, 4, 2, 2)
    learned = str(scheduler.config.get("variance_type")).startswith("learned")
    prediction = torch.zeros(1, 8 if learned else 4, 2, 2)
    extra: dict[str, Any] = {}
    if "generator" in _parameters(type(scheduler).step):
        extra["generator"] = torch.Generator().manual_seed(0)
    if "set_begin_index" in usage.uses and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps[:count]:
        if "scale_model_input" in usage.uses and hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(prediction, timestep, sample, return_dict=False, **extra)[0]
    return bool(torch.isfinite(sample).all())
