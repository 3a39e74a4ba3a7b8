"""Capabilities of a pipeline, derived from its class and components."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.core import Generation
from sfumato.errors import InvalidRequest
from sfumato.sampling import clip_layer
from sfumato.status import Abilities, Input

AUTO_PIPELINES = {"image": "AutoPipelineForImage2Image", "mask": "AutoPipelineForInpainting"}
"""By name: importing them imports every pipeline class, which takes seconds."""

TASKS: Mapping[str, str] = MappingProxyType({"text": "text-to-image", "image": "image-to-image", "mask": "inpainting"})
"""What a request brings → the task."""


@dataclass(frozen=True, slots=True)
class Upscaler:
    factor: int
    """Upscaling factor of each side."""
    multiple: int
    """The source's sides must be multiples of this many pixels, or the class would resize it."""


UPSCALERS: Mapping[str, Upscaler] = MappingProxyType(
    {
        "StableDiffusionUpscalePipeline": Upscaler(4, 4),
        "StableDiffusionLatentUpscalePipeline": Upscaler(2, 32),
        "LDMSuperResolutionPipeline": Upscaler(4, 32),
    }
)
"""diffusers' upscaler classes."""

MULTIPLES: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("StableCascadeCombinedPipeline", "WuerstchenCombinedPipeline"), 128)
)
"""Classes whose code does not say it: of these sides the latents of both stages are whole."""

UPSCALING = Abilities(("upscaling",), (Input("prompt", 0, 1, ("text",)), Input("image", 1, 1, ("picture",))))
"""What each of them is asked for."""


def upscaler(pipeline: Any) -> Upscaler | None:
    return UPSCALERS.get(type(pipeline).__name__)


def transparent(pipeline: Any) -> bool:
    """Whether it draws an alpha channel: its VAE decodes to four channels, and the fourth is not the depth."""
    if hasattr(getattr(pipeline, "image_processor", None), "numpy_to_depth"):
        return False
    config = getattr(getattr(pipeline, "vae", None), "config", {})
    return 4 in (config.get("out_channels"), config.get("input_channels"))


def most_clip_skip(pipeline: Any) -> int | None:
    """The largest `clip_skip`: with it the class reads what goes into the first layer; None if that is not known."""
    encoders = (getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
    layers = [getattr(getattr(each, "config", None), "num_hidden_layers", None) for each in encoders]
    known = [count for count in layers if isinstance(count, int)]
    return min(known) + 1 - clip_layer(0, type(pipeline).__name__) if known else None


def parameters_of(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call, by name."""
    kind: Any = type(pipeline)
    return _parameters(kind.__call__)


@functools.lru_cache(maxsize=256)  # called about thirty times per picture
def _parameters(call: Any) -> Mapping[str, inspect.Parameter]:
    signature = inspect.signature(call).parameters
    return MappingProxyType(
        {
            name: parameter
            for name, parameter in signature.items()
            if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
        }
    )


def tasks(pipeline: Any) -> tuple[str, ...]:
    """The tasks that a class states itself (`modular.adapted`); empty for one that `models.class_reading` reads."""
    return getattr(type(pipeline), "tasks", ())


def task_class(name: str, task: str, *, controlled: bool) -> str | None:
    """The class for `text`, `image` or `mask` on the weights of the class `name`; `controlled`: with a ControlNet."""
    classes = _mappings()[_MAPPINGS[task]]
    families = [
        family for mapping in _mappings().values() for family, class_name in mapping.items() if class_name == name
    ]
    if controlled:
        families = [family if "controlnet" in family else f"{family}-controlnet" for family in families]
    return next((classes[family] for family in families if family in classes), None)


def task_of(name: str) -> str | None:
    """Which of `text`, `image` and `mask` diffusers takes the class `name` for."""
    return next((task for task, table in _MAPPINGS.items() if name in _mappings()[table].values()), None)


_MAPPINGS = {
    "text": "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    "image": "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    "mask": "AUTO_INPAINT_PIPELINES_MAPPING",
}


@functools.cache
def _mappings() -> Mapping[str, Mapping[str, str]]:
    """The tables behind `AUTO_PIPELINES`, family of models to class; read as text, for the same reason."""
    spec = importlib.util.find_spec("diffusers")  # find_spec of a submodule would import diffusers
    assert spec and spec.origin
    text = (Path(spec.origin).parent / "pipelines" / "auto_pipeline.py").read_text()
    tables = re.findall(r"^(AUTO_\w+_MAPPING) = OrderedDict\((.*?)^\)", text, re.M | re.S)
    mappings = {name: dict(re.findall(r'\("([^"]+)", (\w+)\)', rows)) for name, rows in tables}
    for name, family, kind in re.findall(r'^ +(AUTO_\w+_MAPPING)\["([^"]+)"\] = (\w+)', text, re.M):
        mappings[name][family] = kind
    return mappings


def check(model: str, pipeline: Any, generation: Generation) -> None:
    """Raises InvalidRequest for a task that this pipeline does not support."""
    kind = type(pipeline).__name__
    if generation.transparent and not transparent(pipeline):
        raise InvalidRequest(
            f"background transparent: {model} ({kind}) cannot draw an alpha channel; opaque and auto are valid",
            param="background",
        )
    if generation.upscale is None:
        return
    supported = upscaler(pipeline)
    if supported is None:
        raise InvalidRequest(
            f"{model} ({kind}) is not an upscaler. For that a model file needs one of these as "
            f"diffusers.pipeline_type: {', '.join(UPSCALERS)}",
            param="model",
        )
    if generation.upscale != supported.factor:
        raise InvalidRequest(
            f"scale {generation.upscale}: {model} upscales {supported.factor} times; only {supported.factor} is valid",
            param="scale",
        )
