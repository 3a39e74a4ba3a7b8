"""The files of clips: every format is read by others, holds all frames, the sound and the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.core import Recipe
from sfumato.errors import DrawError, InvalidPicture
from sfumato.formats import of_kind
from sfumato.pictures import files, recipe
from sfumato.pictures.results import Clip, Sound
from sfumato.sampling import Sampling
from support.probed import needs, probed

MADE = Recipe(
    model="m", source="o/r", pipeline="WanPipeline", prompt="ein Kätzchen, \"schnell\"\n雪", seed=7,
    sampling=Sampling(steps=2, num_frames=9, fps=12.5, width=32, height=16), image_sha256=(), mask_sha256=None,
    device="cpu", dtype="fp32", versions={"torch": "2"},
)  # fmt: skip
COLOURS = np.linspace(0.1, 0.9, 9)
"""Of the frames, in order: grey, lighter and lighter."""


def frames(size: tuple[int, int] = (32, 16)) -> Any:
    return np.broadcast_to(COLOURS[:, None, None, None], (9, size[1], size[0], 3)).astype(np.float32)


def tone(rate: int, channels: int = 2) -> Sound:
    times = np.arange(int(rate * 9 / 12.5)) / rate
    return Sound(np.stack([np.sin(2 * np.pi * 440 * times)] * channels).astype(np.float32) / 2, rate)


def written(folder: Path, name: str, clip: Clip, made: Recipe = MADE) -> Path:
    needs(name)
    path = folder / f"clip.{name}"
    path.write_bytes(files.encode(clip, made, name))
    return path


def test_every_format_of_clips_has_an_encoder() -> None:
    assert set(of_kind("video")) <= set(files.ENCODERS)


@pytest.mark.parametrize("name", of_kind("video"))
def test_the_recipe_is_inside(name: str, tmp_path: Path) -> None:
    assert recipe.read(written(tmp_path, name, Clip(frames(), 12.5))) == MADE


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_are_the_same_pictures_as_floats(channels: int) -> None:
    noise = np.random.default_rng(1).uniform(-0.1, 1.1, (9, 16, 32, channels)).astype(np.float32)
    clip = Clip(noise, 12.5, tone(48_000))
    held = clip.rounded()
    assert (held.frames.dtype, held.sound, held.fps) == (np.uint8, clip.sound, clip.fps)
    assert held.frames.nbytes * 4 == clip.frames.nbytes
    assert np.abs(held.frames / 255 - noise.clip(0, 1)).max() <= 0.5 / 255 + 1e-6
    pictures, again = ([each.tobytes() for each in made.pictures()] for made in (clip, held))
    assert len(pictures) == 9 and again == pictures


CODECS = {"mp4": "h264", "webm": "vp9", "gif": "gif"}


@pytest.mark.parametrize(("name", "codec"), CODECS.items())
@pytest.mark.parametrize("size", [(32, 16), (33, 17)])
def test_ffprobe_reads_every_frame(name: str, codec: str, size: tuple[int, int], tmp_path: Path) -> None:
    (video,) = probed(written(tmp_path, name, Clip(frames(size), 12.5)))
    assert (video["codec_name"], video["width"], video["height"]) == (codec, *size)
    assert video["nb_read_frames"] == "9"
    assert rate_of(video["avg_frame_rate"]) == pytest.approx(12.5, rel=0.02)


def rate_of(text: str) -> float:
    above, _, below = text.partition("/")
    return int(above) / int(below)


@pytest.mark.parametrize("name", ["webp", "gif"])
def test_pillow_reads_every_frame_in_its_colour(name: str, tmp_path: Path) -> None:
    with Image.open(written(tmp_path, name, Clip(frames(), 12.5))) as image:
        assert (image.format, image.size, image.n_frames) == (name.upper(), (32, 16), 9)
        total = 0
        for index, colour in enumerate(COLOURS):
            image.seek(index)
            image.load()
            total += image.info["duration"]
            assert abs(np.asarray(image.convert("RGB")).mean() - colour * 255) < 3
        assert total == 720  # 9 frames at 12.5 a second


@pytest.mark.parametrize("name", ["mp4", "webm"])
def test_containers_have_every_frame_in_its_colour(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, Clip(frames(), 12.5))
    import av

    with av.open(str(path)) as container:
        read = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert np.abs(np.array(read) - COLOURS * 255).max() < 4


@pytest.mark.parametrize("name", ["mp4", "webm"])
def test_containers_say_how_their_colours_are_to_be_read(name: str, tmp_path: Path) -> None:
    """Players guess by the size where a file does not say it, and so show red as orange."""
    red = np.zeros((9, 16, 32, 3), np.uint8)
    red[..., 0] = 255
    path = written(tmp_path, name, Clip(red, 12.5))
    (video,) = probed(path)
    assert (video["color_space"], video["color_range"]) == ("bt709", "tv")
    import av

    with av.open(str(path)) as container:
        luma = bytes(next(container.decode(video=0)).planes[0])[0]
    assert luma == pytest.approx(16 + 219 * 0.2126, abs=3)  # BT.709; 81 is BT.601


def test_frames_that_are_no_numbers_are_an_error_and_not_black() -> None:
    broken = frames()
    broken[3, 2, 1] = np.nan
    with pytest.raises(DrawError, match="NaN"):
        Clip(broken, 12.5).rounded()


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (24_000, 1), (16_000, 2)])
@pytest.mark.parametrize(("name", "codec"), [("mp4", "aac"), ("webm", "opus")])
def test_the_sound_is_muxed(name: str, codec: str, rate: int, channels: int, tmp_path: Path) -> None:
    path = written(tmp_path, name, Clip(frames(), 12.5, tone(rate, channels)))
    video, audio = probed(path)
    assert (video["codec_type"], video["nb_read_frames"]) == ("video", "9")
    assert (audio["codec_name"], audio["channels"]) == (codec, channels)
    import av

    with av.open(str(path)) as container:
        heard = np.concatenate([frame.to_ndarray().T for frame in container.decode(audio=0)])
    seconds = len(heard) / int(audio["sample_rate"])
    assert seconds == pytest.approx(0.72, abs=2048 / int(audio["sample_rate"]))  # two frames of the codec
    assert np.sqrt((heard.astype(float) ** 2).mean()) == pytest.approx(0.35, abs=0.05)  # a sine of half the range


def test_a_file_without_a_recipe_says_so(tmp_path: Path) -> None:
    plain = tmp_path / "plain.gif"
    Image.new("RGB", (8, 8)).save(plain)
    with pytest.raises(InvalidPicture, match="contains no recipe"):
        recipe.read(plain)
    needs("mp4")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no clip at all")
    with pytest.raises(InvalidPicture, match="damaged"):
        recipe.read(broken)


@pytest.mark.parametrize("name", ["webp", "mp4", "webm"])
def test_frames_become_pixels_one_after_the_other(name: str) -> None:
    """None before the one before it was given to the encoder, so that they are never all pixels at once."""
    needs(name)
    alive: list[int] = []
    most = 0

    class Watched(Clip):
        def picture(self, index: int) -> Image.Image:
            nonlocal most
            image = super().picture(index)
            counted = Marked(image, alive)
            most = max(most, len(alive))
            return counted

    files.encode(Watched(frames(), 12.5), MADE, name)
    assert most <= 2


class Marked(Image.Image):
    """An image that is counted while it lives."""

    def __init__(self, image: Image.Image, alive: list[int]) -> None:
        super().__init__()
        self.im, self._mode, self._size = image.im, image.mode, image.size
        self._alive = alive
        alive.append(id(self))

    def __del__(self) -> None:
        self._alive.remove(id(self))
