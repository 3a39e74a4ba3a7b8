"""The length of a sound: from the request, then the model file, then the class. It is cut to the sample."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from sfumato.checkpoints import sound_rules
from sfumato.checkpoints.sound_rules import SoundInput
from sfumato.core import Generation, SourceSound
from sfumato.drawing.arguments import signature_default
from sfumato.errors import InvalidRequest
from sfumato.formats import AUDIO, kind_of
from sfumato.models.load import Loaded
from sfumato.pictures.results import Sound
from sfumato.pipelines.capabilities import parameters_of
from sfumato.pipelines.inputs import TUNE
from sfumato.sampling import Sampling
from sfumato.status import SoundRule


def settled(model: Loaded, pipeline: Any, requested: Sampling, filled: Generation) -> Generation:
    """`filled`, which has the defaults besides what was `requested`, with the seconds of the sound; they stay None
    where the class reads them from the prompt.

    Raises InvalidRequest for a length that the class does not make, or that is above the limits.
    """
    if kind_of(filled.format) != AUDIO:
        return filled
    seconds = filled.sampling.seconds or own_seconds(model)
    if filled.sound and _source(pipeline).role == TUNE:
        seconds = requested.seconds or filled.sound.seconds  # not the model file's
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
    """The arguments of the call for the length and the source, by the names that the class has."""
    name, rule, seconds = _length(pipeline), sound_rules.of_pipeline(pipeline), filled.sampling.seconds
    if kind_of(filled.format) != AUDIO or not rule:
        return {}
    length = {name: _at_least(rule, seconds)} if name and seconds else {}
    return length | (_of_source(pipeline, rule, filled.sound) if filled.sound else {})


def _of_source(pipeline: Any, rule: SoundRule, sound: SourceSound) -> dict[str, Any]:
    """Raises InvalidRequest for samples at another rate, of a model whose rate was not known when it was decoded."""
    if sound.rate != rule.rate:
        raise InvalidRequest(
            f"audio: {sound.rate} samples a second; the model takes {rule.rate}, which was not known before it was "
            "loaded. Send the request again",
            param="audio",
        )
    taken = _source(pipeline)
    samples = torch.frombuffer(bytearray(sound.samples), dtype=torch.float32).reshape(sound.channels, -1)
    channels = getattr(getattr(pipeline.vae, "config", None), "audio_channels", sound.channels)
    if channels != sound.channels:
        samples = samples.repeat(channels, 1) if sound.channels == 1 else samples.mean(0, keepdim=True)
    # Modules may be on another device, and in half precision.
    samples = samples.to(pipeline._execution_device, pipeline.vae.dtype)
    made = {taken.parameter: samples[None] if taken.batched else samples}
    return made | ({taken.rate: sound.rate} if taken.rate else {})


def _source(pipeline: Any) -> SoundInput:
    return sound_rules.SOURCES[type(pipeline).__name__]


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
