"""Plain diffusers in this process: the loaded pipeline, called as its documentation says."""

from __future__ import annotations

import inspect
import io
import time
from collections.abc import Callable
from typing import Any

from sfumato.config import ModelConfig
from sfumato.engine import environment
from sfumato.errors import SfumatoError


def drawer(config: ModelConfig, device: str, prompt: str, picture: dict[str, Any]) -> Callable[[], float]:
    """A function that draws one `picture` (its size and steps), writes it as PNG, and returns the seconds it took."""
    environment.prepare()
    import torch

    from sfumato.models import load

    pipeline = load.load(config, device, lambda status: None).pipeline
    width, height = (int(side) for side in str(picture["size"]).split("x"))
    wanted = {
        "prompt": prompt, "width": width, "height": height, "num_inference_steps": picture["steps"],
        "guidance_scale": picture["guidance_scale"],
    }  # fmt: skip
    taken = inspect.signature(pipeline.__call__).parameters
    if "prompt" not in taken:
        raise SfumatoError(f"{config.name}: {type(pipeline).__name__} takes no prompt alone; leave out --against")
    arguments = {name: value for name, value in wanted.items() if name in taken and value is not None}

    def draw() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            image = pipeline(**arguments, generator=torch.Generator().manual_seed(1)).images[0]
        image.save(io.BytesIO(), "PNG")
        return time.perf_counter() - began

    return draw
