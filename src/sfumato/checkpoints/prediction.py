"""What a checkpoint was trained to predict: from the model file, else from markers in a single file.

A single file in the original layout has only weights. Models trained with v-prediction or zero terminal SNR have
empty marker keys in it (`v_pred`, `ztsnr`), which other programs read too, or an entry in its metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from safetensors import safe_open

from sfumato.checkpoints import contents, sources, weight_header
from sfumato.config import ModelConfig
from sfumato.errors import ModelFileError
from sfumato.pipelines import request_scheduler

KEYS = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
"""Keys of a model file that are also arguments of diffusers' schedulers."""

EDM = "edm_vpred.sigma_max"
"""Marks continuous v-prediction; this key and `edm_vpred.sigma_min` hold the range of noise levels."""


def apply(config: ModelConfig, pipeline: Any, file: Path | None) -> None:
    """Configure the pipeline's scheduler for it. `file`: the single file that the weights came from, if any."""
    scheduler = getattr(pipeline, "scheduler", None)
    configured = {key: getattr(config, key) for key in KEYS if getattr(config, key) is not None}
    marks = _marks(file) if file else {}
    if scheduler is None or not (configured or marks):
        return
    if request_scheduler.is_flow(scheduler) and configured:
        raise ModelFileError(
            f"{config.name}: {', '.join(configured)}: {type(pipeline).__name__} is a flow model and has none of these; "
            "leave them out",
            param=f"diffusers.{next(iter(configured))}",
        )
    if file and "sigma_max" in marks and not configured:
        pipeline.register_modules(scheduler=diffusers.EDMEulerScheduler(**marks))
        return
    changes = {key: value for key, value in (marks | configured).items() if key in KEYS}
    if changes.get("rescale_betas_zero_snr") and "timestep_spacing" not in changes:
        changes["timestep_spacing"] = "trailing"  # otherwise the timestep with pure noise is never used
    cls: Any = type(scheduler)
    if not changes.keys() <= cls._get_init_keys(cls):
        cls = diffusers.EulerDiscreteScheduler  # PNDM does not support zero terminal SNR
    pipeline.register_modules(scheduler=cls.from_config(scheduler.config, **changes))


def _marks(file: Path) -> dict[str, Any]:
    if file.suffix.lower() not in sources.SAFE:
        return {}  # a pickle has no header
    header = weight_header.of_file(file)
    names = header.tensors
    marks = contents.prediction(header)
    if EDM in names and "edm_vpred.sigma_min" in names:
        with safe_open(file, "pt") as tensors:
            highest, lowest = (float(tensors.get_tensor(key)) for key in (EDM, "edm_vpred.sigma_min"))
        marks |= {"sigma_max": highest, "sigma_min": lowest, "sigma_data": 1.0, "prediction_type": "v_prediction",
                  "sigma_schedule": "exponential"}  # fmt: skip
    return marks
