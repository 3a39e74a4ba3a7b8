"""What a source says of how it is drawn: size, steps, guidance, scheduler, prediction. For `sfumato add`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato import schedulers
from sfumato.checkpoints import class_reading, contents, diffusers_source, few_steps, static_capabilities
from sfumato.checkpoints.weight_header import Header
from sfumato.config.model import DEFAULTS
from sfumato.errors import InvalidRequest

PAGE_CLASSES = re.compile(r"StableDiffusion(?!3)")
KEYS: Mapping[str, str] = MappingProxyType({"num_inference_steps": "step", "guidance_scale": "cfg_scale"})
"""Argument of the pipeline -> key of a model file."""
SCHEDULES: Mapping[str, str] = MappingProxyType(
    {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
)
CONTINUOUS = ("EDM", "Flow")
"""Schedulers of these kinds have no prediction type to choose."""


def of(
    pipeline: str, folder: Path | None, index: Mapping[str, Any], header: Header | None, name: str
) -> dict[str, Any]:
    """Keys of a model file -> values, for a class with these configurations; what nothing says is left out.

    `name`: of the source, which tells where the files do not that few steps are enough.
    """
    scheduler = diffusers_source.json_of(folder / "scheduler" / "scheduler_config.json") if folder else {}
    denoiser = _denoiser(folder)
    values: dict[str, Any] = {}
    if folder and (side := static_capabilities.default_side(pipeline, folder, index)):
        values["size"] = f"{side}x{side}"
    values |= _steps(pipeline, scheduler, denoiser, index, name)
    if chosen := _scheduler(scheduler):
        values["diffusers.scheduler_type"] = chosen
    marks = contents.prediction(header) if header else {}
    trained = scheduler.get("prediction_type")
    if isinstance(trained, str) and not str(scheduler.get("_class_name")).startswith(CONTINUOUS):
        values["diffusers.prediction_type"] = trained
        if scheduler.get("rescale_betas_zero_snr") is True:
            values["diffusers.rescale_betas_zero_snr"] = True
    return values | {f"diffusers.{key}": value for key, value in marks.items()}


def _denoiser(folder: Path | None) -> Mapping[str, Any]:
    for part in ("transformer", "unet"):
        if folder and (described := diffusers_source.json_of(folder / part / "config.json")):
            return described
    return {}


def _steps(
    pipeline: str, scheduler: Mapping[str, Any], denoiser: Mapping[str, Any], index: Mapping[str, Any], name: str
) -> dict[str, int | float]:
    """Steps and guidance: of a distilled model, else of the seed page or of the class's own signature."""
    parameters = class_reading.parameters(pipeline) or {}
    own = {argument: parameters[argument].default for argument in KEYS if argument in parameters}
    if PAGE_CLASSES.match(pipeline):
        own = {argument: DEFAULTS[KEYS[argument]] for argument in own}
    own |= few_steps.of(pipeline, str(scheduler.get("_class_name")), denoiser, index, name)
    return {KEYS[argument]: value for argument, value in own.items() if type(value) in (int, float)}


def _scheduler(described: Mapping[str, Any]) -> str | None:
    """The table's name for a scheduler with this configuration; None if it has none."""
    kind = described.get("_class_name")
    schedule = next((name for key, name in SCHEDULES.items() if described.get(key) is True), None)
    best: tuple[int, str] | None = None
    for name, solver in schedulers.SOLVERS.items():
        for form in (solver.noise, solver.flow):
            if form and form.cls == kind and _is_like(described, form.arguments):
                fit = (len(form.arguments), name)
                best = max(best, fit, key=lambda each: each[0]) if best else fit
    if best is None:
        return None
    try:
        return schedulers.parse(best[1], schedule).name
    except InvalidRequest:
        return None


def _is_like(described: Mapping[str, Any], arguments: Mapping[str, object]) -> bool:
    """Whether what the configuration says does not contradict the solver's own arguments."""
    loose = {"skip_prk_steps", "lower_order_final"}
    return all(described.get(key) == value for key, value in arguments.items() if key not in loose)
