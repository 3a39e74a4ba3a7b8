"""The files of clips: MP4 and WebM by PyAV (the extra `video`), animated WebP and GIF by Pillow, each frame by frame.

The recipe is in MP4's and WebM's tag `comment`, in WebP's EXIF block as in pictures, and in GIF's comment.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from PIL import Image

from sfumato.core import Recipe
from sfumato.pictures import recipe as recipes
from sfumato.pictures.results import Clip, Sound


@dataclass(frozen=True, slots=True)
class Codecs:
    """How PyAV writes a container."""

    video: str
    options: Mapping[str, str]
    """Of the video: near transparent, as a clip is written once and there is no other copy of it."""
    audio: str
    audio_rates: tuple[int, ...] = ()
    """Samples a second that the audio codec takes; none: any."""


CODECS: Mapping[str, Codecs] = MappingProxyType(
    {
        "mp4": Codecs("libx264", {"crf": "17", "preset": "medium"}, "aac"),
        "webm": Codecs("libvpx-vp9", {"crf": "20", "b": "0", "cpu-used": "3", "row-mt": "1"}, "libopus", (48_000,)),
    }
)
"""H.264 plays everywhere; VP9 and Opus are what WebM is for, and free of licences."""

COLOURS: Mapping[str, int] = MappingProxyType({"colorspace": 1, "color_range": 1, "color_primaries": 1, "color_trc": 1})
"""BT.709 in limited range, in FFmpeg's numbers (`AVCOL_SPC_BT709` ...), and told in the file: of one that does not say
it, players take BT.601 for small frames, and BT.709 from 720 lines on."""


def _in_container(clip: Clip, recipe: Recipe, *, format: str) -> bytes:
    import av  # the extra `video`

    codecs, file = CODECS[format], io.BytesIO()
    with av.open(file, "w", format=format) as container:
        container.metadata[recipes.COMMENT] = recipes.json_of(recipe)
        picture: Any = container.add_stream(codecs.video, _rate(clip.fps), dict(codecs.options))
        picture.width, picture.height = clip.size
        picture.pix_fmt = "yuv444p" if any(side % 2 for side in clip.size) else "yuv420p"
        for name, value in COLOURS.items():
            setattr(picture.codec_context, name, value)
        sound = _audio_stream(container, codecs, clip.sound) if clip.sound else None
        for image in clip.pictures():
            frame = av.VideoFrame.from_image(image).reformat(
                format=picture.pix_fmt, dst_colorspace=COLOURS["colorspace"], dst_color_range=COLOURS["color_range"]
            )
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        if clip.sound and sound:
            _write_sound(container, sound, clip.sound)
    return file.getvalue()


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def _audio_stream(container: Any, codecs: Codecs, sound: Sound) -> Any:
    return container.add_stream(codecs.audio, sound.rate_for(codecs.audio_rates), layout=sound.layout)


def _write_sound(container: Any, stream: Any, sound: Sound) -> None:
    import av

    frame = av.AudioFrame.from_ndarray(sound.samples[:2].clip(-1, 1), format="fltp", layout=sound.layout)
    frame.sample_rate = sound.rate
    container.mux(stream.encode(frame))  # PyAV resamples, and cuts it into the codec's frames
    container.mux(stream.encode())


def _animated(clip: Clip, recipe: Recipe, *, format: str) -> bytes:
    file = io.BytesIO()
    _Frames(clip).save(
        file, format.upper(), save_all=True, loop=0, duration=_durations(clip, STEPS_MS[format]),
        **TAGS[format](recipe),
    )  # fmt: skip
    return file.getvalue()


STEPS_MS: Mapping[str, int] = MappingProxyType({"webp": 1, "gif": 10})
"""What a frame's duration is a multiple of, in milliseconds."""

TAGS: Mapping[str, Callable[[Recipe], Mapping[str, Any]]] = MappingProxyType(
    {
        "webp": lambda recipe: {"quality": 90, "method": 4, "exif": recipes.exif(recipe)},
        "gif": lambda recipe: {"comment": recipes.json_of(recipe).encode()},
    }
)


def _durations(clip: Clip, step: int) -> list[int]:
    """Of each frame in milliseconds: rounded where each begins, so that they do not drift."""
    begins = [step * round(index * 1000 / clip.fps / step) for index in range(len(clip) + 1)]
    return [max(step, after - before) for before, after in itertools.pairwise(begins)]


class _Frames(Image.Image):
    """A clip as Pillow reads an animated file: it writes one frame at a time."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self._clip = clip
        self.n_frames = len(clip)
        self.is_animated = self.n_frames > 1
        self._mode, self._size = "RGB", clip.size
        self._at = -1
        self.seek(0)

    def seek(self, frame: int) -> None:
        if not 0 <= frame < self.n_frames:
            raise EOFError(f"no frame {frame}")
        if frame != self._at:
            self.im = self._clip.picture(frame).im
            self._at = frame

    def tell(self) -> int:
        return self._at


ENCODERS: Mapping[str, Callable[[Clip, Recipe], bytes]] = MappingProxyType(
    {
        **{format: functools.partial(_in_container, format=format) for format in CODECS},
        **{format: functools.partial(_animated, format=format) for format in TAGS},
    }
)
"""A format of clips -> what makes a clip that file."""
