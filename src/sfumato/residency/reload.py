"""Whether a model in memory serves a request, or must be loaded again: what its file says now may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato.config import ModelConfig
from sfumato.models import weight_stamps
from sfumato.models.load import Loaded
from sfumato.sampling import Sampling

PER_REQUEST: Mapping[str, Any] = {
    "aliases": (), "pinned": False, "disabled": False, "file": None, "enable_parameters": frozenset(),
    "quality_steps": (), "seed": None, "n": None, "option_lines": (), "locked": frozenset(),
    "threads": None, "accelerate": None, "max_concurrent": None, "keep_alive": None,
    "retry_after": 0, "part_of_file": False,
}  # fmt: skip
"""Fields without effect on loading, with a value that replaces them in comparisons."""


def notice(model: Loaded) -> None:
    """Mark a model whose weight files were replaced or written over as broken, so that it is loaded again."""
    if not model.state.broken and (changed := weight_stamps.changed(model.state.stamps)):
        model.state.broken = f"{changed[0].name} has changed on disk"


def serves(model: Loaded, config: ModelConfig) -> bool:
    """Whether the loaded model can serve a request with `config`."""
    return not model.state.broken and loading_config(model.config) == loading_config(config)


def loading_config(config: ModelConfig) -> ModelConfig:
    """The config without the fields that each request reads itself: changing only those does not reload."""
    sampling = Sampling(scheduler=config.sampling.scheduler, clip_skip=config.sampling.clip_skip)  # `load` checks these
    return replace(config, **PER_REQUEST, sampling=sampling)
