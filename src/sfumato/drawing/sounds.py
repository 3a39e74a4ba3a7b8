"""The length of a sound: from the request, then the model file, then the class. It is cut to the sample."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sfumato.checkpoints import sound_rules
from sfumato.core import Generation
from sfumato.drawing.arguments import signature_default
from sfumato.errors import InvalidRequest
from sfumato.formats import AUDIO, kind_of
from sfumato.models.load import Loaded
from sfumato.pictures.results import Sound
from sfumato.pipelines.capabilities import parameters_of
from sfumato.sampling import Sampling
from sfumato.status import SoundRule


def settled(model: Loaded, pipeline: Any, filled: Generation) -> Generation:
    """`filled` with the seconds of the sound; they stay None where the class reads them from the prompt.

    Raises InvalidRequest for a length that the class does not make, or that is above the limits.
    """
    if kind_of(filled.format) != AUDIO:
        return filled
    seconds = filled.sampling.seconds or own_seconds(model)
    rule = sound_rules.of_pipeline(pipeline)
    if seconds is None or rule is None:
        return filled
    if why := rule.violation(seconds):
        raise InvalidRequest(
            f"seconds: {seconds:g}; {model.config.name} does not make that long a sound: {why}", param="seconds"
        )
    if filled.limits and seconds > filled.limits.seconds:
        raise InvalidRequest(
            f"seconds: {seconds:g} are {model.config.name}'s own length, and {filled.limits.seconds:g} are allowed "
            "(the setting max_seconds); send `seconds`",
            param="seconds",
        )
    return replace(filled, sampling=replace(filled.sampling, seconds=seconds))


def arguments(pipeline: Any, filled: Generation) -> dict[str, Any]:
    """The argument of the call for the length, by the name that the class has."""
    name, rule, seconds = _length(pipeline), sound_rules.of_pipeline(pipeline), filled.sampling.seconds
    if kind_of(filled.format) != AUDIO or not (name and rule and seconds):
        return {}
    return {name: _at_least(rule, seconds)}


def cut(pipeline: Any, filled: Generation, sound: Sound) -> tuple[Sound, list[str]]:
    """The sound at the requested length, and a warning if the class made less."""
    rule, seconds = sound_rules.of_pipeline(pipeline), filled.sampling.seconds
    if rule is None or seconds is None:
        return sound, []
    wanted = rule.samples(seconds)
    made = replace(sound, samples=sound.samples[:, :wanted])
    short = made.samples.shape[1] < wanted
    return made, [f"seconds: {made.seconds:.6g} were made, and {seconds:g} requested"] if short else []


def defaults(model: Loaded) -> Sampling:
    """What a sound has that nobody said anything of."""
    return Sampling(seconds=model.config.sampling.seconds or own_seconds(model))


def own_seconds(model: Loaded) -> float | None:
    """Of the model file's options, of the class's signature, or of what the denoiser was trained on."""
    pipeline, name = model.pipeline, _length(model.pipeline)
    own = model.config.options.get(name or "") or (signature_default(pipeline, name) if name else None)
    rule, denoiser = sound_rules.of_pipeline(pipeline), getattr(pipeline, "unet", None)
    if own or rule is None:
        return float(own) if own else None
    size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if isinstance(size, int):  # of spectrograms, or of samples
        return size * getattr(pipeline, "vae_scale_factor", 1) * (rule.piece or 1 / rule.rate)
    return rule.most if name == "audio_end_in_s" else None


def _length(pipeline: Any) -> str | None:
    """What the class calls the length in seconds; None: it does not take one."""
    return next((name for name in sound_rules.LENGTHS if name in parameters_of(pipeline)), None)


def _at_least(rule: SoundRule, seconds: float) -> float:
    """What to ask a class for that rounds down, to whole pieces or to a sample, for at least these seconds."""
    if rule.piece:
        return (math.ceil(seconds / rule.piece - 1e-6) + 0.5) * rule.piece
    while int(seconds * rule.rate) < rule.samples(seconds):
        seconds = math.nextafter(seconds, math.inf)
    return seconds
