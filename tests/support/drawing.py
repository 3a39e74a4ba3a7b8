"""What `draw` takes, made of a pipeline that no loader has seen."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from sfumato.config import ModelConfig
from sfumato.core import Generation
from sfumato.models.load import Loaded


def quiet(*args: Any) -> None: ...


def loaded(pipeline: Any, **fields: Any) -> Loaded:
    """`pipeline` as if it had been loaded."""
    pipeline.set_progress_bar_config(disable=True)
    config = ModelConfig(**{"name": "m", "model": "m", "dtype": "fp32", **fields})
    return Loaded(config, pipeline, "m", "cpu", "fp32")


def wanted(**fields: Any) -> Generation:
    return Generation(**{"id": "1", "prompt": "", "seed": 1, "steps": 2, **fields})


def source(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
    return file.getvalue()
