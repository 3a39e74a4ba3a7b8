"""The rate and the lengths at which a class makes sound, from the settings of its parts.

No signature says them: the rate is the VAE's, the vocoder's or the denoiser's, and a class makes no more than its
denoiser was trained for.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from sfumato.checkpoints import diffusers_source
from sfumato.pipelines.inputs import TIMBRE, TUNE
from sfumato.status import SoundRule

LENGTHS = ("audio_end_in_s", "audio_length_in_s", "audio_duration_s", "audio_duration", "duration")
"""Parameters of calls for the seconds of a sound."""

RATES = (("vocoder", "sampling_rate"), ("vae", "sampling_rate"), ("vae", "sample_rate"), ("unet", "sample_rate"))
"""Parts that make samples, and what their settings call samples a second."""


@dataclass(frozen=True, slots=True)
class SoundInput:
    """How a class takes a sound."""

    parameter: str
    role: str
    """`TUNE`: the result has its length and is drawn over it; `TIMBRE`: it sounds like it."""
    rate: str = ""
    """The parameter for its samples a second."""
    batched: bool = False
    """Whether it has a dimension for the batch."""


SOURCES: Mapping[str, SoundInput] = MappingProxyType(
    {
        "StableAudioPipeline": SoundInput("initial_audio_waveforms", TUNE, "initial_audio_sampling_rate", batched=True),
        "AceStepPipeline": SoundInput("reference_audio", TIMBRE),
    }
)
"""Classes that take a sound, each compared with a plain call. Stable Audio 3's for sounds begin with noise alone by
default, and ACE-Step's `src_audio` needs another task than to make music of a text."""

SMALLEST = 3
"""`DanceDiffusionPipeline` wants so many times the samples that its UNet makes one of."""

Setting: TypeAlias = Callable[[str, str], Any]
"""A setting of a component, by the names of both; None: there is none."""


def sound_rule(name: str, setting: Setting) -> SoundRule | None:
    """The rule of a class of sound; None if its rate is not known."""
    rate = next((value for part, key in RATES if (value := setting(part, key))), None)
    if not isinstance(rate, int):
        return None
    shrinks = setting("unet", "up_block_types") if setting("unet", "sample_rate") else ()
    return SoundRule(
        rate,
        least=SMALLEST * 2 ** len(shrinks) / rate if shrinks else 0.0,
        most=_longest(name, setting, rate),
        piece=_piece(setting) / rate,
    )


def of_pipeline(pipeline: Any) -> SoundRule | None:
    """The rule of a pipeline in memory."""
    return sound_rule(type(pipeline).__name__, lambda part, key: _setting(getattr(pipeline, part, None), key))


def _setting(module: Any, key: str) -> Any:
    config = getattr(module, "config", None)
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _longest(name: str, setting: Setting, rate: int) -> float | None:
    """In seconds: of the latents that the denoiser was trained on, of the embedding of durations, or a constant."""
    latents, ratios = setting("transformer", "sample_size"), setting("vae", "downsampling_ratios")
    if isinstance(latents, int) and ratios:
        return latents * math.prod(ratios) / rate
    embedded = setting("duration_embedder", "max_val")
    return float(embedded) if embedded else _constant(name, "max_wav_duration")


def _piece(setting: Setting) -> int:
    """Samples of what the class makes whole ones of, where it rounds the length down to them; else 0."""
    rates = setting("vocoder", "upsample_rates")
    return math.prod(rates) if rates else setting("vae", "downsampling_ratio") or 0


@functools.cache
def _constant(name: str, attribute: str) -> float | None:
    """A number that a class's constructor sets."""
    for function in diffusers_source.methods(name, "__init__"):
        for node in ast.walk(function):
            match node:
                case ast.Assign(targets=[ast.Attribute(attr=attr)], value=ast.Constant(value=int() | float() as value)):
                    if attr == attribute:
                        return float(value)
    return None
