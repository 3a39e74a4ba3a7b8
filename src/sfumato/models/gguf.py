"""GGUF files: they hold a quantised denoiser only; the other components come from the repository it was made from.

diffusers reads them with its GGUF quantiser, which needs the package `gguf` (the extra of that name).
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.config import ModelConfig
from sfumato.errors import ModelFileError
from sfumato.models import sources

SUFFIX = ".gguf"
DENOISERS = ("transformer", "unet")
"""Components that a GGUF file can replace."""


def is_one(config: ModelConfig) -> bool:
    """Whether a model's source is a GGUF file."""
    return sources.suffix_of(config) == SUFFIX


def base(config: ModelConfig) -> ModelConfig:
    """The config of the model with the other components. Raises ModelFileError if it, or the package, is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelFileError(
            f"{config.name}: reading a .gguf file needs the package gguf. Run `pip install 'sfumato[gguf]'`, and start "
            "Sfumato again",
            param="parameters.model",
        )
    if not config.base_model:
        raise ModelFileError(
            f"{config.name}: a .gguf file holds a denoiser alone. Name the repository (or folder) that it was made "
            "from, for all else: `diffusers: {base_model: owner/name}`",
            param="diffusers.base_model",
        )
    return of_base(config, config.base_model)


def of_base(config: ModelConfig, model: str) -> ModelConfig:
    """The config with `model` as its source; where the GGUF file itself comes from does not apply to it."""
    return replace(config, model=model, base_model=None, repo=None, revision=None, snapshot=None, downloads=())


def denoiser(path: Path, described: Path, index: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Load the file as the component it replaces, with the configuration of the base repository at `described`."""
    import diffusers

    part = next((name for name in DENOISERS if name in index), None)
    if part is None:
        raise ModelFileError(
            f"{described}: has neither of {', '.join(DENOISERS)}, which a .gguf file could take the place of",
            param="diffusers.base_model",
        )
    cls = getattr(diffusers, index[part][1])
    quantization = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    module = cls.from_single_file(
        str(path), config=str(described), subfolder=part, quantization_config=quantization, dtype=dtype
    )
    return {part: module}
