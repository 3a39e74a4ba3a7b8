"""The picture or the clip in what a pipeline returns, whatever its output class calls it."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import torch
from PIL import Image

from sfumato.checkpoints import class_reading, sound_rules
from sfumato.checkpoints.clip_rules import USUAL_RATE
from sfumato.core import Generation
from sfumato.drawing import sounds
from sfumato.errors import DrawError
from sfumato.formats import AUDIO, VIDEO, kind_of
from sfumato.pictures.results import MADE_NAN, Clip, Result, Sound
from sfumato.pipelines.capabilities import parameters_of

FIELDS = ("images", "image", "rgb", "prediction", "frames", "video")
"""Fields of outputs that hold pictures."""

MOVING_FIELDS = ("frames", "video", "images")
"""Fields of outputs that hold the frames of a clip."""

BESIDES = ("depth",)
"""Fields of outputs that hold another picture, which is not returned."""

VISUALISED = re.compile(r"\w*?([A-Z][a-z]+)Output")
"""The last word of an output class's name: its image processor has a `visualize_` for the word."""


def form(pipeline: Any, kind: str) -> dict[str, str]:
    """Arguments for the form of the output. Of two pictures in one, diffusers cannot always make PIL's; the frames of
    a clip stay numbers until they are encoded."""
    if kind == VIDEO or (kind == AUDIO and "output_type" in parameters_of(pipeline)):
        return {"output_type": "np"}
    two = class_reading.output_fields(type(pipeline).__name__) & {*BESIDES}
    return {"output_type": "np"} if two else {}


def result_of(pipeline: Any, output: Any, generation: Generation) -> tuple[Result, list[str]]:
    """What the generation is for, and warnings for what else there was. Raises DrawError if there is none."""
    if kind_of(generation.format) == VIDEO:
        clip = clip_of(pipeline, output, generation.sampling.fps or USUAL_RATE)
        lost = getattr(output, "audio", None) is not None and clip.sound is None
        return clip, [f"audio: {type(pipeline).__name__} does not say its rate; it is not returned"] if lost else []
    if kind_of(generation.format) == AUDIO:
        return sounds.cut(pipeline, generation, sound_of(pipeline, output))
    return picture_of(pipeline, output)


def sound_of(pipeline: Any, output: Any) -> Sound:
    """The first sound of a batch. Raises DrawError if there is none, or if it is not finite."""
    value, rule = getattr(output, "audios", None), sound_rules.of_pipeline(pipeline)
    if value is None or rule is None:
        raise DrawError(f"{type(pipeline).__name__} returned no sound but {type(output).__name__}")
    return _sound(np.atleast_2d(torch.as_tensor(value[0]).float().cpu().numpy()), rule.rate)


def _sound(samples: np.ndarray[Any, Any], rate: int) -> Sound:
    if not np.isfinite(samples).all():
        raise DrawError(MADE_NAN)
    return Sound(samples, rate)


def clip_of(pipeline: Any, output: Any, fps: float) -> Clip:
    """The first clip of a batch, with its sound if the class makes one. Raises DrawError if there is none."""
    value = next((each for name in MOVING_FIELDS if (each := getattr(output, name, None)) is not None), None)
    if value is None:
        raise DrawError(f"{type(pipeline).__name__} returned no frames but {type(output).__name__}")
    return Clip(_frames(value), fps, _sound_of(pipeline, getattr(output, "audio", None)))


def _frames(value: Any) -> np.ndarray[Any, Any]:
    """(frames, height, width, channels), 0 .. 1, of an array or a tensor of a batch, or of pictures in a list."""
    while isinstance(value, list) and len(value) and isinstance(value[0], list):
        value = value[0]
    if isinstance(value, list) and isinstance(value[0], Image.Image):
        return np.stack([np.asarray(each.convert("RGB"), np.float32) / 255 for each in value])
    if isinstance(value, list):
        value = value[0] if getattr(value[0], "ndim", 0) == 4 else np.stack(value)
    if isinstance(value, torch.Tensor):
        value = value.float().cpu().movedim(-3, -1).numpy()
    return np.asarray(value[0] if value.ndim == 5 else value)


def _sound_of(pipeline: Any, audio: Any) -> Sound | None:
    """The sound beside the frames, (batch, channels, samples) or without channels; its rate is the vocoder's, of
    Kandinsky 6 the pipeline's. Raises DrawError if it is not finite."""
    config = getattr(getattr(pipeline, "vocoder", None), "config", {})
    rate = config.get("output_sampling_rate") or getattr(pipeline, "audio_sample_rate", None)
    if audio is None or rate is None:
        return None
    samples = torch.as_tensor(audio).float().cpu().numpy()
    samples = samples[0] if samples.ndim == 3 else samples
    return _sound(samples if samples.ndim == 2 else samples[None], int(rate))


def picture_of(pipeline: Any, output: Any) -> tuple[Image.Image, list[str]]:
    """The picture, and warnings for what else there was. Raises DrawError if there is none."""
    for field in FIELDS:
        value = getattr(output, field, None)
        if value is None:
            continue
        warnings = [
            f"{each}: {type(pipeline).__name__} makes one too; it is not returned"
            for each in BESIDES
            if getattr(output, each, None) is not None
        ]
        if field == "prediction":
            return _visualised(pipeline, output, value)
        return _first(value, layers=field == "images"), warnings
    raise DrawError(f"{type(pipeline).__name__} returned no picture but {type(output).__name__}")


def _first(value: Any, *, layers: bool) -> Image.Image:
    """The first picture of a batch. `layers`: a list within the batch is composited, else its first is taken."""
    while isinstance(value, list) and value and not isinstance(value[0], Image.Image):
        value = value[0]
        if layers and isinstance(value, list) and isinstance(value[0], Image.Image):
            layers_of_one: list[Image.Image] = [layer.convert("RGBA") for layer in value]
            return functools.reduce(Image.alpha_composite, layers_of_one)
    if isinstance(value, list):
        value = value[0]
    return value if isinstance(value, Image.Image) else _of_numbers(value)


def _of_numbers(value: Any) -> Image.Image:
    """Of an array (..., height, width, channels) or a tensor (..., channels, height, width), 0 .. 1."""
    array = value.float().cpu().movedim(-3, -1).numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    while array.ndim > 3:
        array = array[0]
    pixels = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _visualised(pipeline: Any, output: Any, prediction: Any) -> tuple[Image.Image, list[str]]:
    """A predicted map as the pipeline's own image processor shows it; of several maps the first."""
    match = VISUALISED.fullmatch(type(output).__name__)
    show = getattr(pipeline.image_processor, f"visualize_{match[1].lower()}", None) if match else None
    if show is None:
        return _first(prediction, layers=False), []
    properties = getattr(pipeline, "target_properties", None)
    shown = (show(prediction, properties) if properties else show(prediction))[0]
    if not isinstance(shown, dict):
        return _first(shown, layers=False), []
    first, *others = shown
    return _first(shown[first], layers=False), [
        f"prediction: {first} is returned, {', '.join(others)} is not"
    ] if others else []
