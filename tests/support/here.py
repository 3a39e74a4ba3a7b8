"""Models that are loaded and drawn in this process, from the hub on localhost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, hf_api

from sfumato.config import ModelConfig
from sfumato.core import Generation
from sfumato.drawing.draw import draw
from sfumato.models import load
from sfumato.pictures.images import decoded
from sfumato.sampling import nested
from support.hub import Hub


def quiet(*args: Any) -> None: ...


def config(folder: Path, model: str | Path, **fields: Any) -> ModelConfig:
    """Of a model file in `folder` that says no more than where the weights are."""
    return ModelConfig(**nested({"name": "m", "model": str(model), "file": folder / "m.yaml", "folder": folder,
                                 "dtype": "fp32", **fields}))  # fmt: skip


def asked(**fields: Any) -> Generation:
    made = {"id": "1", "prompt": "a cat", "seed": 1, "steps": 2, "width": 64, "height": 64, **fields}
    return Generation(**nested(made))


def drawn(made: ModelConfig, **fields: Any) -> Any:
    """The picture of a model as numbers, height x width x 3."""
    return np.asarray(decoded(draw(load.load(made, "cpu", quiet), asked(**fields), quiet).file)).astype(int)


def use(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """From now on `huggingface_hub` of this process asks `hub`; its cache is new."""
    patch.setenv("HF_ENDPOINT", hub.url)
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(hf_api.api, "endpoint", hub.url)
    patch.setenv("HF_HUB_CACHE", str(cache))


def cut(patch: pytest.MonkeyPatch) -> None:
    """From now on there is no network."""
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert huggingface_hub.constants.HF_HUB_OFFLINE
