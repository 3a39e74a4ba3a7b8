"""What a checkpoint was trained to predict: as the model file says, else as a single file's own marks say.

A single file in the original layout has weights alone; those who train with v-prediction or zero terminal SNR leave
keys without meaning in it (`v_pred`, `ztsnr`), which every program looks for, or a line in its metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from safetensors import safe_open

from sfumato.config import ModelConfig
from sfumato.errors import ModelFileError
from sfumato.models import single_file
from sfumato.pipelines import request_scheduler

KEYS = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
"""Of a model file, and arguments of diffusers' schedulers."""

EDM = "edm_vpred.sigma_max"
"""Marks a continuous v-prediction: with `edm_vpred.sigma_min` it has the noise levels."""


def apply(config: ModelConfig, pipeline: Any, file: Path | None) -> None:
    """Have the scheduler of a pipeline know it. `file`: the single file that it came from."""
    own = getattr(pipeline, "scheduler", None)
    said = {key: getattr(config, key) for key in KEYS if getattr(config, key) is not None}
    marks = _marks(file) if file else {}
    if own is None or not (said or marks):
        return
    if request_scheduler.is_flow(own) and said:
        raise ModelFileError(
            f"{config.name}: {', '.join(said)}: {type(pipeline).__name__} is a flow model and has none of these; "
            "leave them out",
            param=f"diffusers.{next(iter(said))}",
        )
    if file and "sigma_max" in marks and not said:
        pipeline.register_modules(scheduler=diffusers.EDMEulerScheduler(**marks))
        return
    changes = {key: value for key, value in (marks | said).items() if key in KEYS}
    if changes.get("rescale_betas_zero_snr") and "timestep_spacing" not in changes:
        changes["timestep_spacing"] = "trailing"  # else the step with no signal at all is never drawn from
    kind: Any = type(own)
    if not changes.keys() <= kind._get_init_keys(kind):
        kind = diffusers.EulerDiscreteScheduler  # PNDM knows no zero SNR
    pipeline.register_modules(scheduler=kind.from_config(own.config, **changes))


def _marks(file: Path) -> dict[str, Any]:
    header = single_file.header_of(file)
    metadata = header.get("__metadata__", {})
    marks: dict[str, Any] = {}
    if "v_pred" in header or metadata.get("modelspec.prediction_type") in ("v", "v_prediction"):
        marks["prediction_type"] = "v_prediction"
        if "ztsnr" in header:
            marks["rescale_betas_zero_snr"] = True
    if EDM in header and "edm_vpred.sigma_min" in header:
        with safe_open(file, "pt") as tensors:
            highest, lowest = (float(tensors.get_tensor(key)) for key in (EDM, "edm_vpred.sigma_min"))
        marks |= {"sigma_max": highest, "sigma_min": lowest, "sigma_data": 1.0, "prediction_type": "v_prediction",
                  "sigma_schedule": "exponential"}  # fmt: skip
    return marks
