"""The files of sounds: WAV by the standard library; FLAC, MP3 and Opus by PyAV (the extra `video`).

The recipe is in WAV's INFO list as its comment, and in the tag `comment` of the others: a Vorbis comment in FLAC and
Opus, an ID3 frame in MP3.
"""

from __future__ import annotations

import functools
import io
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sfumato.core import Recipe
from sfumato.pictures import recipe as recipes
from sfumato.pictures import riff
from sfumato.pictures.results import Sound

LOUDEST = 2**15 - 1
"""The largest sample of 16 bits."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How PyAV writes a format."""

    name: str
    container: str
    samples: str
    """Of the codec: `fltp` is planes of floats, `s16` is 16 bits interleaved."""
    bit_rate: int | None = None
    """Bits a second; None: lossless."""
    rates: tuple[int, ...] = ()
    """Samples a second that it takes, rising; none: any."""


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "flac": Codec("flac", "flac", "s16"),
        "mp3": Codec(
            "libmp3lame", "mp3", "fltp", 256_000, (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
        ),
        "opus": Codec("libopus", "ogg", "flt", 160_000, (8000, 12000, 16000, 24000, 48000)),
    }
)


def _wav(sound: Sound, recipe: Recipe) -> bytes:
    """PCM of 16 bits, the form that every player reads, with the recipe behind the samples."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(sound.samples.shape[0])
        writer.setsampwidth(2)
        writer.setframerate(sound.rate)
        writer.writeframes(_pcm(sound).tobytes())
    return riff.with_comment(file.getvalue(), recipes.json_of(recipe))


def _pcm(sound: Sound) -> Any:
    """(samples, channels), 16 bits, little-endian."""
    return (sound.samples.T.clip(-1, 1) * LOUDEST).round().astype("<i2")


def _compressed(sound: Sound, recipe: Recipe, *, format: str) -> bytes:
    import av  # the extra `video`

    codec, file = CODECS[format], io.BytesIO()
    with av.open(file, "w", format=codec.container) as container:
        stream: Any = container.add_stream(codec.name, sound.rate_for(codec.rates), layout=sound.layout)
        stream.format = codec.samples
        if codec.bit_rate:
            stream.bit_rate = codec.bit_rate
        for tagged in (container, stream):  # Ogg has tags of streams, the others of the file
            tagged.metadata[recipes.COMMENT] = recipes.json_of(recipe)
        frame = av.AudioFrame.from_ndarray(_pcm(sound).reshape(1, -1), format="s16", layout=sound.layout)
        frame.sample_rate = sound.rate
        container.mux(stream.encode(frame))  # PyAV converts it, and cuts it into the codec's frames
        container.mux(stream.encode())
    return file.getvalue()


ENCODERS: Mapping[str, Callable[[Sound, Recipe], bytes]] = MappingProxyType(
    {"wav": _wav, **{format: functools.partial(_compressed, format=format) for format in CODECS}}
)
"""A format of sounds -> what makes a sound that file."""
