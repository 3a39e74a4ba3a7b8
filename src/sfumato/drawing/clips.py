"""The length and the rate of a clip: from the request, then the model file, then the class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato.checkpoints import clip_rules
from sfumato.core import Generation, SourceClip
from sfumato.drawing.arguments import Canvas, own_size, signature_default
from sfumato.errors import InvalidRequest
from sfumato.formats import VIDEO, check_rate, kind_of
from sfumato.models.load import Loaded
from sfumato.pictures.results import Clip, Result
from sfumato.pictures.source_clips import CLOSE
from sfumato.pipelines.capabilities import parameters_of
from sfumato.pipelines.inputs import FRAME_COUNTS
from sfumato.sampling import Sampling
from sfumato.status import FrameRule

TRAINED = ("num_frames", "sample_frames")
"""Settings of denoisers for the frames that they were trained with."""


def settled(model: Loaded, pipeline: Any, requested: Sampling, filled: Generation) -> Generation:
    """`filled`, which has the defaults besides what was `requested`, with the frames and the rate of the clip.

    The frames stay None where they are the class's own. Raises InvalidRequest for frames that it does not draw.
    """
    if kind_of(filled.format) != VIDEO:
        return filled
    sampling, rule = filled.sampling, clip_rules.of_pipeline(pipeline)
    if filled.clip:
        return _of_source(model.config.name, rule, requested, filled, filled.clip)
    fps, frames = sampling.fps or rate(model, pipeline), sampling.num_frames
    if sampling.seconds and (requested.seconds or frames is None):  # a request's, before the file's frames
        frames = rule.at_least(sampling.seconds * fps)
    elif filled.limits:
        filled.limits.check_length(frames or default_frames(model) or 1, fps)
    check_rate(filled.format, fps)
    why = rule.violation(frames or 1) if _count(pipeline) else f"{type(pipeline).__name__} has its own number"
    if frames and why:
        raise InvalidRequest(
            f"num_frames: {frames}; {model.config.name} does not draw that many: {why}", param="num_frames"
        )
    return replace(filled, sampling=replace(sampling, num_frames=frames, fps=fps, seconds=None))


def _of_source(model: str, rule: FrameRule, requested: Sampling, filled: Generation, clip: SourceClip) -> Generation:
    """The frames and the rate of a clip from another one: that one's own, not the model file's, if the request says
    none. Raises InvalidRequest for more frames than there are."""
    fps = requested.fps or clip.fps
    length = requested.num_frames or (math.floor(requested.seconds * fps + 1e-6) if requested.seconds else len(clip))
    if not (requested.num_frames or requested.fps) and length * (1 - CLOSE) <= len(clip):
        length = min(length, len(clip))  # its rate says no closer how many frames those seconds have
    if length > len(clip):
        raise InvalidRequest(
            f"num_frames: {length}; the source clip has {len(clip)}. Send at most as many, or leave it out",
            param="num_frames",
        )
    frames = requested.num_frames or rule.at_most(length)
    if frames < rule.first:
        raise InvalidRequest(
            f"video: {length} frames of it are to be drawn from; {model} draws {rule.first} or more", param="video"
        )
    if why := rule.violation(frames):
        raise InvalidRequest(f"num_frames: {frames}; {model} does not draw that many: {why}", param="num_frames")
    check_rate(filled.format, fps)
    if filled.limits:
        filled.limits.check_length(frames, fps)
    return replace(filled, sampling=replace(filled.sampling, num_frames=frames, fps=fps, seconds=None))


def check_size(model: Loaded, filled: Generation, canvas: Canvas) -> None:
    """Raises InvalidRequest for a clip that is larger than the limits, also by the defaults of its model."""
    if kind_of(filled.format) != VIDEO or not filled.limits:
        return
    own = own_size(model)
    width, height = canvas.width or own[0] or 1, canvas.height or own[1] or 1
    filled.limits.check_clip(width, height, filled.sampling.num_frames or default_frames(model) or 1)


def warnings(requested: Generation, filled: Generation, result: Result) -> list[str]:
    """A warning if the class drew other frames than it was told, or a source clip has frames that nobody left out."""
    frames = filled.sampling.num_frames
    if not isinstance(result, Clip):
        return []
    told = [] if frames in (None, len(result)) else [f"num_frames: {len(result)} were drawn, and {frames} requested"]
    clip, sampling = requested.clip, requested.sampling
    if clip and frames and frames < len(clip) and not (sampling.num_frames or sampling.seconds):
        told.append(f"num_frames: {frames}, and the source clip has {len(clip)}: the class does not draw as many")
    return told


def arguments(pipeline: Any, filled: Generation) -> dict[str, Any]:
    """The arguments of the call for them, by the names that the class has."""
    if kind_of(filled.format) != VIDEO:
        return {}
    taken, count = parameters_of(pipeline), _count(pipeline)
    made: dict[str, Any] = {count: filled.sampling.num_frames} if count and filled.sampling.num_frames else {}
    for name in clip_rules.RATES:
        if name in taken and filled.sampling.fps:
            made[name] = _like(taken, name, filled.sampling.fps)
    return made


def _like(taken: Mapping[str, Any], name: str, fps: float) -> float:
    """A whole number where the class has one: some count with it."""
    return round(fps) if isinstance(taken[name].default, int) else fps


def defaults(model: Loaded) -> Sampling:
    """What a clip has that nobody said anything of."""
    return Sampling(num_frames=default_frames(model), fps=rate(model, model.pipeline))


def default_frames(model: Loaded) -> int | None:
    """Those of the model file, of the class's signature, or of the denoiser that was trained with so many."""
    pipeline, config = model.pipeline, model.config
    count = _count(pipeline)
    own = config.options.get(count or "") or (signature_default(pipeline, count) if count else None)
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    each = clip_rules.LATENT_FRAMES.get(type(denoiser).__name__, 1)
    trained = [(getattr(denoiser, "config", {}).get(name) or 0) * each for name in TRAINED]
    known = [config.sampling.num_frames, own, *trained]
    return next((frames for frames in known if isinstance(frames, int) and frames), None)


def frames(model: Loaded, generation: Generation) -> float:
    """Those of a clip before its pipeline is chosen, not rounded to what the class draws; 1 if nobody says."""
    requested, clip = generation.sampling, generation.clip
    if clip:
        return len(clip)  # no more than it draws
    if requested.seconds:
        return requested.seconds * (requested.fps or rate(model, model.pipeline))
    return requested.num_frames or default_frames(model) or 1


def _count(pipeline: Any) -> str | None:
    """What the class calls the number of frames; None: it does not take one."""
    return next((name for name in FRAME_COUNTS if name in parameters_of(pipeline)), None)


def rate(model: Loaded, pipeline: Any) -> float:
    """Frames a second of a clip whose request does not say it."""
    options = model.config.options
    return model.config.sampling.fps or clip_rules.own_rate(
        type(pipeline).__name__, lambda name: options.get(name) or signature_default(pipeline, name)
    )
