"""What a generation ends in: a picture, a clip or a sound, and the formats of their files.

One table: which formats requests may name, what clients are told of a file, and which package writes it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sfumato.errors import InvalidRequest

KINDS = (IMAGE, VIDEO, AUDIO) = ("image", "video", "audio")
"""What a generation ends in: one picture, frames in a row (perhaps with sound), or sound."""

WORDS: Mapping[str, str] = MappingProxyType({IMAGE: "pictures", VIDEO: "clips", AUDIO: "sound"})
"""Kind -> what messages call it."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format of files that the engine writes."""

    name: str
    """Also the suffix of its files."""
    kind: str
    """A name of `KINDS`."""
    media_type: str
    package: str = ""
    """The module that writes it, besides those that are always installed."""
    extra: str = ""
    """The extra of this package that installs it."""
    most_fps: float | None = None
    """Frames a second of its clips; None: any."""


_PYAV: Mapping[str, Any] = {"package": "av", "extra": "video"}

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        each.name: each
        for each in (
            Format("png", IMAGE, "image/png"),
            Format("mp4", VIDEO, "video/mp4", **_PYAV),
            Format("webm", VIDEO, "video/webm", **_PYAV),
            Format("webp", VIDEO, "image/webp", most_fps=90),  # and those of 10 ms and less, of any format
            Format("gif", VIDEO, "image/gif", most_fps=50),  # browsers show frames below 20 ms for 100 ms
            Format("wav", AUDIO, "audio/wav"),
            Format("flac", AUDIO, "audio/flac", **_PYAV),
            Format("mp3", AUDIO, "audio/mpeg", **_PYAV),
            Format("opus", AUDIO, "audio/ogg", **_PYAV),
        )
    }
)
"""By name. Pictures end in PNG, which front ends convert; clips and sounds are written once, as requested."""

PICTURE = "png"
"""The format of pictures."""

CLIP = "mp4"
"""The format of clips that nobody named."""


SOUND = "wav"
"""The format of sounds that nobody named."""


def of_kind(kind: str) -> list[str]:
    """The formats of pictures, clips or sounds; the first is that which nobody has to name."""
    return [each.name for each in FORMATS.values() if each.kind == kind]


def written_here(kind: str) -> list[str]:
    """Those of them whose packages are installed."""
    return [name for name in of_kind(kind) if _is_installed(FORMATS[name])]


def kind_of(name: str) -> str:
    return FORMATS[name].kind


def check(name: str, kind: str, param: str) -> None:
    """Raises InvalidRequest, with the field `param`, unless files of this kind can be written in this format here."""
    if name not in of_kind(kind):
        raise InvalidRequest(
            f"{param}: {name[:100]!r}; {', '.join(of_kind(kind))} are valid for {WORDS[kind]}", param=param
        )
    check_installed(name, param)


def check_rate(name: str, fps: float) -> None:
    """Raises InvalidRequest for frames a second that a file of this format does not keep."""
    most = FORMATS[name].most_fps
    if most and fps > most:
        raise InvalidRequest(
            f"fps: {fps:g}; a {name} file has at most {most:g} frames a second. Send a lower fps, or another "
            "output_format",
            param="fps",
        )


def check_installed(name: str, param: str) -> None:
    """Raises InvalidRequest if the package that writes this format is not installed here."""
    chosen = FORMATS[name]
    if not _is_installed(chosen):
        others = [each for each in of_kind(chosen.kind) if not FORMATS[each].package]
        raise InvalidRequest(
            f"{param}: {name} needs {chosen.package}, which is not installed on the server "
            f"(pip install 'sfumato[{chosen.extra}]'); {' and '.join(others)} work without it",
            param=param,
        )


def _is_installed(format: Format) -> bool:
    return not format.package or importlib.util.find_spec(format.package) is not None
