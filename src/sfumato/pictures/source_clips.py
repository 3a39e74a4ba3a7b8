"""Decode callers' clips, frame by frame, to RGB at the size that is drawn.

MP4, MOV and WebM by PyAV (the extra `video`); GIF and animated WebP, PNG and AVIF by Pillow. Nothing is trusted: the
format is told by the first bytes and no other demuxer is tried, as some of FFmpeg's open other files; the header is
read before frames are, each frame is checked again, and no more are decoded than are drawn. Untrusted clips are opened
only in the processes of `decoder_pool`: they can be killed.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from sfumato.errors import InvalidPicture
from sfumato.pictures import images
from sfumato.pictures.containers import codec_of, open_untrusted
from sfumato.pictures.fitting import of_source
from sfumato.pictures.images import Bounds
from sfumato.sampling import NAMED

CODECS = ("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "mpeg4", "prores")
"""FFmpeg's names of those to decode: what phones, browsers, editors and Sfumato write."""

STILLS = (b"avif", b"heic", b"heix", b"mif1")
"""Brands of pictures in the container that MP4 has, too."""

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv")
"""Of URLs of clips."""

_URL = re.compile(r"\s*https?://[^/?#]*(?P<path>[^?#]*)", re.IGNORECASE)

HEAD = 4096
"""Bytes that tell whether a file is a clip."""

SEQUENCE = b"avis"
"""The brand of an animated AVIF."""

WEBP_MOVES = 0x02
"""The flag of an animated WebP."""

CHANNELS = 3

MOST_PIXELS = 340 * 10**6
"""Of all frames together, whatever is allowed: as many as a message to the worker holds (`process.wire.MAX_BYTES`)."""

CLOSE = 0.02
"""The rate in a header counts if it is that of the frames within this part of it: containers round times."""

UNEVEN = 2.5
"""Times the median interval: a longer one is no rounding, and not one frame that a camera left out."""


SHORT_S = 0.3
"""Seconds that a whole file may end before its header says."""

FORMATS = ("MP4", "MOV", "WebM", *images.ANIMATED)
"""For errors."""

FPS = NAMED["fps"]


class Frame(NamedTuple):
    image: Image.Image
    begins: Fraction | None
    """In seconds; None: the file does not say."""
    lasts: Fraction | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    size: tuple[int, int]
    """Width and height of a frame in pixels."""
    frames: Iterator[Frame]
    rate: float | None = None
    """Frames a second by the header."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a request draws of its clip."""

    most: int
    """Frames that are allowed."""
    pixels: int
    """Of all frames together, that are allowed."""
    num_frames: int | None = None
    seconds: float | None = None
    fps: float | None = None
    size: tuple[int, int] | None = None
    """Width and height; None: as `fitting.of_source` says."""
    own: tuple[int, int] = (0, 0)
    """The size that the model draws by itself; zeros: not known."""
    multiple: int = 1
    """Of which its sides are multiples; 1: not known."""


def is_clip(file: str | bytes) -> bool | None:
    """Whether it is a clip and no picture; None: its bytes are not here, or its format holds both.

    File bytes, base64, `data:` URI, URL or the name of an uploaded file.
    """
    if isinstance(file, bytes):
        return _moves(file[:HEAD])
    if match := _URL.match(file):
        return match["path"].lower().endswith(SUFFIXES) or None
    text = "".join(file[: 2 * HEAD].rpartition("base64,")[2].split())
    try:
        return _moves(base64.b64decode(text[: len(text) // 4 * 4], validate=True))
    except ValueError:
        return None


def _moves(head: bytes) -> bool | None:
    """The same of the first bytes of a file."""
    if container(head):
        return True
    if head[4:8] == b"ftyp":
        return head[8:12] == SEQUENCE
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return head[12:16] == b"VP8X" and bool(head[20:21]) and bool(head[20] & WEBP_MOVES)
    if head[1:4] == b"PNG":
        return True if b"acTL" in head else False if b"IDAT" in head else None
    return False if head.startswith((b"\xff\xd8", b"BM")) else None


def container(start: bytes) -> str | None:
    """FFmpeg's name of the container that a file is, by its first 12 bytes; None: it is of none that is read."""
    if start[4:8] == b"ftyp" and start[8:12] not in (*STILLS, SEQUENCE):
        return "mov"
    return "matroska" if start[:4] == b"\x1aE\xdf\xa3" else None


def check(data: bytes, param: str, bounds: Bounds) -> tuple[int, int]:
    """Width and height by the header. Raises InvalidPicture if that is refused, or there are no moving pictures."""
    with _opened(data, param, bounds) as clip:
        return clip.size


def decode(data: bytes, param: str, bounds: Bounds, drawn: Drawn) -> tuple[dict[str, Any], memoryview]:
    """The frames, one after another, and `width`, `height`, `fps`, `size` and `sha256` as `core.SourceClip` has them.

    Raises InvalidPicture for a clip that is damaged, too large or shorter than what is drawn of it.
    """
    with _opened(data, param, bounds) as clip:
        size = drawn.size or _own(clip.size, drawn)
        room = min(drawn.most, min(drawn.pixels, MOST_PIXELS) // (size[0] * size[1]))
        pixels = bytearray()
        times: list[Frame] = []
        count, enough = _count(drawn), False
        for frame in clip.frames:
            if enough := _is_late(times, frame, drawn):
                break
            if len(times) == room:
                raise _too_many(param, room, size)
            pixels += _fitted(frame.image, size).tobytes()
            times.append(Frame(_NOTHING, frame.begins, frame.lasts))
            if enough := len(times) == count:  # before the next frame is decoded: it may be damaged
                break
    if len(times) < 2 and drawn.num_frames != 1:
        raise _one_frame(enough, drawn, param)
    fps = _rate(times, clip.rate, drawn, param)
    if not enough:
        _refuse_short(len(times), fps, drawn, param)
    told = {"width": size[0], "height": size[1], "fps": fps, "size": clip.size}
    return told | {"sha256": hashlib.sha256(data).hexdigest()}, memoryview(pixels)


_NOTHING = Image.new("RGB", (1, 1))


def _own(size: tuple[int, int], drawn: Drawn) -> tuple[int, int]:
    return of_source(size, drawn.own, drawn.multiple) if all(drawn.own) else size


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _count(drawn: Drawn) -> int | None:
    """Frames that are drawn; None: all, or as many as the clip's own rate says."""
    if drawn.num_frames or not (drawn.seconds and drawn.fps):
        return drawn.num_frames
    return math.ceil(drawn.seconds * drawn.fps - 1e-6)


def _is_late(times: list[Frame], frame: Frame, drawn: Drawn) -> bool:
    """Whether this frame is shown after the `seconds` that are drawn at the clip's own rate."""
    if not drawn.seconds or drawn.num_frames or drawn.fps or not times or frame.begins is None:
        return False
    return frame.begins - (times[0].begins or 0) >= drawn.seconds - 1e-6


def _one_frame(enough: bool, drawn: Drawn, param: str) -> InvalidPicture:
    if enough:
        return InvalidPicture(
            f"seconds: {drawn.seconds:g}; that is one frame of the clip in {param}, and at least 2 are drawn from. "
            "Send more, or leave it out",
            param="seconds",
        )
    return InvalidPicture(f"{param}: it is one picture, and a clip is needed: at least 2 frames", param=param)


def _too_many(param: str, room: int, size: tuple[int, int]) -> InvalidPicture:
    return InvalidPicture(
        f"{param}: the clip has more than {room} frames, the most of {size[0]}x{size[1]} (the settings max_frames and "
        "max_clip_megapixels). Send num_frames or seconds to draw its beginning, a smaller size, or a shorter clip",
        param=param,
    )


def _refuse_short(frames: int, fps: float, drawn: Drawn, param: str) -> None:
    """The file ended before all that is drawn."""
    wanted = drawn.num_frames or (int(drawn.seconds * (drawn.fps or fps) + 1e-6) if drawn.seconds else 0)
    if frames >= wanted * (1 if _count(drawn) else 1 - CLOSE):  # the clip's own rate is no closer
        return
    field, value = ("num_frames", wanted) if drawn.num_frames else ("seconds", drawn.seconds)
    raise InvalidPicture(
        f"{field}: {value:g}; the clip in {param} has {frames} frames, and {wanted} would be drawn from it at "
        f"{drawn.fps or fps:g} "
        f"a second. Send less, or leave {field} out",
        param=field,
    )


def _rate(times: list[Frame], by_header: float | None, drawn: Drawn, param: str) -> float:
    """Frames a second. Raises InvalidPicture if they are not evenly spaced or of no rate that a clip is made with, and
    the request does not say the rate."""
    rate = _own_rate(times, by_header, drawn, param)
    least, most = FPS.least or 0, FPS.most or math.inf
    if not (drawn.fps or least <= rate <= most):
        raise InvalidPicture(
            f"{param}: the clip has {rate:g} frames a second; {least:g} to {most:g} are valid. Send `fps`, the rate of "
            "the result",
            param="fps",
        )
    return rate


def _own_rate(times: list[Frame], by_header: float | None, drawn: Drawn, param: str) -> float:
    begins = [frame.begins for frame in times]
    known = [begin for begin in begins if begin is not None]
    gaps = [float(after - before) for before, after in itertools.pairwise(known)]
    if not gaps or len(known) < len(times) or min(gaps) <= 0:
        if rate := drawn.fps or by_header:
            return round(rate, 3)
        raise InvalidPicture(f"{param}: the clip does not say its frames a second; send `fps`", param="fps")
    usual = statistics.median(gaps)
    if max(gaps) > UNEVEN * usual + 1e-9 and not drawn.fps:
        raise InvalidPicture(
            f"{param}: the clip's rate changes: its frames last {min(gaps) * 1000:.0f} to {max(gaps) * 1000:.0f} ms. "
            "Send `fps`, the rate at which they are played, or a clip of one rate",
            param=param,
        )
    last = times[-1].lasts
    if last and last > UNEVEN * usual:  # an animation rests on its last frame
        last = None
    rate = len(gaps) / sum(gaps) if last is None else len(times) / (sum(gaps) + float(last))
    return round(by_header if by_header and abs(by_header - rate) < CLOSE * rate else rate, 3)


@contextmanager
def _opened(data: bytes, param: str, bounds: Bounds) -> Iterator[Opened]:
    """Errors of the decoders become InvalidPicture."""
    if format := container(data[:12]):
        with _of_container(data, param, bounds, format) as clip:
            yield clip
        return
    with images.open_untrusted(data, param, "clip", FORMATS) as image:
        if image.format not in images.ANIMATED or not getattr(image, "is_animated", False):
            raise InvalidPicture(
                f"{param}: it is a picture ({image.format}), and a clip is needed: MP4, MOV, WebM, or an animated GIF, "
                "WebP, PNG or AVIF",
                param=param,
            )
        images.check_size(image.size, param, bounds)
        yield Opened(image.size, _animated(image, param))


def _animated(image: Image.Image, param: str) -> Iterator[Frame]:
    """Raises InvalidPicture for a frame of another size: a GIF's may be larger than its screen."""
    begins, index = Fraction(0), 0
    if getattr(image, "default_image", False):  # of a PNG: a picture for those who cannot play it
        index = 1
    size = image.size
    while True:
        try:
            image.seek(index)
        except EOFError:
            return
        if image.size != size:
            raise _resized(param, size, image.size)
        shown = images.on_white(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        lasts = Fraction(image.info.get("duration") or 0) / 1000
        yield Frame(shown, begins, lasts)
        begins, index = begins + lasts, index + 1


@contextmanager
def _of_container(data: bytes, param: str, bounds: Bounds, format: str) -> Iterator[Opened]:
    try:
        import av  # noqa: F401
    except ImportError:
        raise InvalidPicture(
            f"{param}: MP4, MOV and WebM need PyAV, which is not installed on the server "
            "(pip install 'sfumato[video]'); an animated GIF, WebP, PNG or AVIF works without it",
            param=param,
        ) from None
    with open_untrusted(data, format, param, "clip") as file:
        stream = next(iter(file.streams.video), None)
        if stream is None:
            raise InvalidPicture(f"{param}: the file has no moving pictures, only sound", param=param)
        codec = codec_of(stream, CODECS, param)
        images.check_size((codec.width, codec.height), param, bounds)
        codec.thread_count = 1  # leave the other CPU cores to others
        codec.options = {"max_pixels": str(bounds.pixels)}
        frames = _decoded(file, stream, param, bounds)
        first = next(frames, None)
        if first is None:
            raise InvalidPicture(f"{param}: the file has no frame that can be decoded", param=param)
        rate = float(stream.average_rate) if stream.average_rate else None
        yield Opened(first.image.size, _with(first, frames), rate)


def _with(first: Frame, others: Iterator[Frame]) -> Iterator[Frame]:
    yield first
    yield from others


def _decoded(file: Any, stream: Any, param: str, bounds: Bounds) -> Iterator[Frame]:
    """Upright, in square pixels. Raises InvalidPicture for a frame of another size, and at the end of a file that was
    cut off."""
    size: tuple[int, int] | None = None
    shape = stream.sample_aspect_ratio or Fraction(1)
    count, ends = 0, 0.0
    for packet in file.demux(stream, *file.streams.audio):
        if packet.is_corrupt:
            raise _cut_off(param, count)
        if packet.stream is not stream:
            ends = max(ends, _end(packet))
            continue
        for frame in packet.decode():
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                raise _resized(param, size, (frame.width, frame.height))
            shown = _in_squares(size, shape)
            images.check_size(shown, param, bounds)
            image = frame.to_image()
            if shown != size:  # as cameras and discs record wide pictures in few pixels
                image = image.resize(shown, Image.Resampling.LANCZOS)
            if frame.rotation:  # phones write how they were held
                image = image.rotate(frame.rotation, expand=True)
            yield Frame(image, None if frame.pts is None else Fraction(frame.pts) * frame.time_base)
            ends = max(ends, _end(frame))
            count += 1
    whole = [float(stream.duration * stream.time_base)] if stream.duration else []
    whole += [file.duration / 1_000_000] if file.duration else []
    if ends and whole and min(whole) - ends > SHORT_S:
        raise _cut_off(param, count)


def _in_squares(size: tuple[int, int], shape: Fraction) -> tuple[int, int]:
    """The size at which pixels of this width : height are square ones: no side becomes smaller."""
    width, height = size
    return (round(width * shape), height) if shape >= 1 else (width, round(height / shape))


def _end(part: Any) -> float:
    """Of a packet or a frame, in seconds; 0: it does not say when it begins."""
    return 0.0 if part.pts is None else float((part.pts + (part.duration or 0)) * part.time_base)


def _resized(param: str, first: tuple[int, int], size: tuple[int, int]) -> InvalidPicture:
    return InvalidPicture(
        f"{param}: the clip's size changes from {first[0]}x{first[1]} to {size[0]}x{size[1]}", param=param
    )


def _cut_off(param: str, count: int) -> InvalidPicture:
    return InvalidPicture(f"{param}: the clip is cut off after {count} frames; send the whole file", param=param)
