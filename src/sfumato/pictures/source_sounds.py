"""Decode callers' sounds to samples at the rate that a model takes: WAV of integers by itself, others by PyAV.

As with clips: the format is told by the first bytes, no more is decoded than is allowed, and it is done only in the
processes of `decoder_pool`.
"""

from __future__ import annotations

import array
import hashlib
import io
import sys
import wave
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from sfumato.errors import InvalidPicture
from sfumato.pictures.containers import codec_of, open_untrusted

DEMUXERS: Mapping[bytes, str] = MappingProxyType(
    {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg", b"\x1aE\xdf\xa3": "matroska", b"ID3": "mp3",
     **dict.fromkeys((b"\xff" + bytes([each]) for each in (0xFA, 0xFB, 0xF2, 0xF3, 0xE2, 0xE3)), "mp3")}
)  # fmt: skip
"""First bytes of a file -> FFmpeg's name of its format; MP4 and M4A have `ftyp` after four bytes. An MP3 without tags
begins with the head of a frame: MPEG 1, 2 or 2.5, with or without a checksum (ISO 11172-3, 2.4.1.3)."""

CODECS = ("flac", "mp3", "mp3float", "opus", "libopus", "vorbis", "aac", "pcm_s16le", "pcm_s24le", "pcm_s32le",
          "pcm_f32le", "pcm_u8")  # fmt: skip

MIN_RATE = 1000
MAX_RATE = 384_000
"""Samples a second of what is resampled: at 1 a second, 8 KB would become gigabytes."""

UNTOLD = 0x7FFF_0000
"""Bytes of samples: a WAV that says as many or more was written to a pipe, and goes on to its end."""

MOST_CHANNELS = 2

MAX_LEVEL = 64
"""Times full scale: floats may be louder, and codecs overshoot."""


def decode(data: bytes, param: str, most_s: float, rate: int | None) -> tuple[dict[str, Any], bytes]:
    """The samples, channel by channel in floats of 32 bits, and `channels`, `rate` and `sha256` as `core.SourceSound`
    has them. `most_s`: seconds that are allowed; `rate`: samples a second to return; None: as the file has them.

    Raises InvalidPicture for a sound that is damaged, longer, or cannot be resampled here.
    """
    format = check_format(data, param)
    plain = _of_wave(data, param, most_s, rate) if format == "wav" else None
    channels, made, samples = plain or _by_pyav(data, param, format, most_s, rate)
    if not len(samples[0]):
        raise InvalidPicture(f"{param}: the sound has no samples", param=param)
    told = {"channels": channels, "rate": made, "sha256": hashlib.sha256(data).hexdigest()}
    return told, b"".join(each.tobytes() for each in samples)


def check_format(data: bytes, param: str) -> str:
    """FFmpeg's name of the file's format. Raises InvalidPicture if it is of none that is read."""
    if format := demuxer(data[:12]):
        return format
    start = data[:12].decode("latin-1")
    raise InvalidPicture(
        f"{param}: not a sound in a known format (WAV, FLAC, MP3, Ogg, MP4, WebM): it starts with {start!r}",
        param=param,
    )


def demuxer(start: bytes) -> str | None:
    """FFmpeg's name of a file's format, by its first 12 bytes; None: it is of none that is read."""
    if start[4:8] == b"ftyp":
        return "mov"
    if start[:4] == b"RIFF" and start[8:12] != b"WAVE":
        return None
    return next((name for mark, name in DEMUXERS.items() if start.startswith(mark)), None)


WIDTHS: Mapping[int, str] = MappingProxyType({2: "h", 4: "i"})
"""Bytes of a sample -> its type in `array`."""


def _of_wave(
    data: bytes, param: str, most_s: float, rate: int | None
) -> tuple[int, int, list[array.array[float]]] | None:
    """Of 16 or 32 bits at this rate; None: PyAV has to read it."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, own, count = file.getparams()[:4]
            if width not in WIDTHS or channels > MOST_CHANNELS or rate not in (None, own):
                return None
            _check_rate(own, param, 1)  # nothing is resampled
            if count * width * channels >= UNTOLD:
                count = len(file.readframes(len(data))) // (width * channels)
                file.rewind()
            _refuse_long(count / own, most_s, param)
            samples = array.array(WIDTHS[width], file.readframes(count))
    except (wave.Error, EOFError, ZeroDivisionError, ValueError):
        return None
    if sys.byteorder == "big":
        samples.byteswap()
    full = float(1 << (8 * width - 1))
    if len(samples) < count * channels:
        raise InvalidPicture(f"{param}: the sound is cut off; send the whole file", param=param)
    return channels, own, [array.array("f", (each / full for each in samples[n::channels])) for n in range(channels)]


def _by_pyav(
    data: bytes, param: str, format: str, most_s: float, rate: int | None
) -> tuple[int, int, list[array.array[float]]]:
    try:
        import av  # the extra `video`
    except ImportError:
        told = f" and {rate} samples a second" if rate else ""
        raise InvalidPicture(
            f"{param}: sounds other than WAV of 16 or 32 bits, mono or stereo{told}, need PyAV, which is not installed "
            "on the server (pip install 'sfumato[video]')",
            param=param,
        ) from None
    with open_untrusted(data, format, param, "sound") as file:
        stream = next(iter(file.streams.audio), None)
        if stream is None:
            raise InvalidPicture(f"{param}: the file has no sound", param=param)
        codec = codec_of(stream, CODECS, param)
        _check_rate(codec.sample_rate, param)
        made = rate or codec.sample_rate
        channels = min(codec.channels, MOST_CHANNELS)
        layout = "mono" if channels == 1 else "stereo"
        samples = [array.array("f") for _ in range(channels)]
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=made)
        for frame in _resampled(_short(file.decode(stream), param, most_s), resampler):
            planes = frame.to_ndarray()
            if not abs(planes).max(initial=0) <= MAX_LEVEL:  # also refuses NaN
                raise InvalidPicture(
                    f"{param}: the sound has samples beyond {MAX_LEVEL} times full scale, or that are no numbers",
                    param=param,
                )
            for each, plane in zip(samples, planes, strict=True):
                each.frombytes(plane.tobytes())
    return channels, made, samples


def _short(frames: Iterator[Any], param: str, most_s: float) -> Iterator[Any]:
    """The frames, each measured before it is resampled: its own head says its rate, whatever the file's says."""
    seconds = 0.0
    for frame in frames:
        _check_rate(frame.sample_rate, param)
        seconds += frame.samples / frame.sample_rate
        _refuse_long(seconds, most_s, param)
        yield frame


def _resampled(frames: Iterator[Any], resampler: Any) -> Iterator[Any]:
    for frame in frames:
        yield from resampler.resample(frame)
    yield from resampler.resample(None)


def _check_rate(rate: int, param: str, least: int = MIN_RATE) -> None:
    if not least <= rate <= MAX_RATE:
        raise InvalidPicture(
            f"{param}: {rate} samples a second; {least} to {MAX_RATE} are valid. Resample it", param=param
        )


def _refuse_long(seconds: float, most_s: float, param: str) -> None:
    if seconds > most_s + 0.1:  # codecs add a little
        raise InvalidPicture(
            f"{param}: the sound is longer than {most_s:g} seconds, the most that is read (the setting max_seconds). "
            "Send its beginning",
            param=param,
        )
