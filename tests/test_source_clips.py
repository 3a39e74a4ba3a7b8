"""Source clips: their frames, size and rate in every format, in the decoder's process, and hostile files."""

from __future__ import annotations

import asyncio
import base64
import io
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sfumato.errors import InvalidPicture
from sfumato.pictures import recipe, source_clips
from sfumato.pictures.decoder_pool import Decoders
from sfumato.pictures.images import Bounds
from sfumato.pictures.source_clips import Drawn, is_clip
from sfumato.settings import Settings
from support.drawing import source
from support.moving import animated, contained, frames_of, silent_film, streamed
from support.probed import needs

BOUNDS = Bounds(pixels=1 << 20, aspect=8, kept_pixels=1 << 20, kept_side=4096)
LOSSLESS = ("WEBP", "PNG")
CONTAINERS = ("mp4", "mov", "webm")


def decoded(data: bytes, **drawn: Any) -> tuple[dict[str, Any], list[Image.Image]]:
    answer, pixels = source_clips.decode(data, "video", BOUNDS, Drawn(**{"most": 64, "pixels": 1 << 22} | drawn))
    size, each = (answer["width"], answer["height"]), answer["width"] * answer["height"] * 3
    frames = [Image.frombytes("RGB", size, pixels[at : at + each]) for at in range(0, len(pixels), each)]
    return answer, frames


def clip(format: str, count: int = 11, size: tuple[int, int] = (64, 48), **more: Any) -> bytes:
    if format in CONTAINERS:
        needs("mp4")
        return contained(format, count, size, **more)
    return animated(format, count, size, **more)


def unlike(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of levels."""
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / len(one.tobytes())


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF", *CONTAINERS])
def test_frames_and_rate(format: str) -> None:
    answer, frames = decoded(clip(format))
    assert (answer["size"], len(frames)) == ((64, 48), 11)
    assert answer["fps"] == (16 if format in CONTAINERS else 20)
    for frame, expected in zip(frames, frames_of(11, (64, 48)), strict=True):
        assert unlike(frame, expected) <= (0 if format in LOSSLESS else 24)
    assert unlike(frames[0], frames_of(2, (64, 48))[1]) > 40  # as other frames are


@pytest.mark.parametrize("format", ["WEBP", "mp4"])
@pytest.mark.parametrize(
    ("drawn", "count", "size"),
    [
        ({"num_frames": 5}, 5, (64, 48)),
        ({"seconds": 0.25, "fps": 8.0}, 2, (64, 48)),
        ({"size": (32, 32)}, 11, (32, 32)),
        ({"own": (32, 32), "multiple": 16}, 11, (32, 32)),
        ({"own": (512, 512), "multiple": 16}, 11, (64, 48)),
        ({"most": 11}, 11, (64, 48)),
        ({"most": 3, "num_frames": 3}, 3, (64, 48)),
    ],
)
def test_no_more_is_decoded_than_is_drawn(
    format: str, drawn: dict[str, Any], count: int, size: tuple[int, int]
) -> None:
    answer, frames = decoded(clip(format), **drawn)
    assert (len(frames), frames[0].size, answer["size"]) == (count, size, (64, 48))


def test_seconds_are_counted_at_the_rate_of_the_clip() -> None:
    assert len(decoded(clip("WEBP"), seconds=0.3)[1]) == 6
    assert len(decoded(clip("mp4"), seconds=0.25)[1]) == 4


def test_seconds_of_a_clip_whose_frames_were_left_out() -> None:
    """As a phone in the dark leaves them out: 8 seconds at 30 a second are 238 frames."""
    needs("mp4")
    at_ms = [round(index * 100 / 3) for index in range(600) if index not in (60, 120)]
    answer, frames = decoded(contained("mp4", 598, (16, 16), fps=30, at_ms=at_ms), seconds=8.0, most=250)
    assert (len(frames), answer["fps"]) == (238, pytest.approx(30, abs=0.3))


def test_a_rate_out_of_range_is_played_as_the_request_says() -> None:
    needs("mp4")
    assert len(decoded(contained("mp4", 11, fps=240), fps=30.0)[1]) == 11


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_sound_may_go_on_after_the_frames(format: str) -> None:
    needs("mp4")
    assert len(decoded(contained(format, 10, sound_s=4.0))[1]) == 10


def test_a_film_with_sound_that_was_cut_off_is_refused() -> None:
    needs("mp4")
    data = contained("webm", 40, (64, 64), sound_s=2.5)
    with pytest.raises(InvalidPicture, match=r"cut off after [0-9]+ frames"):
        decoded(cut(data, 0.6))


def test_one_slow_frame_is_whole() -> None:
    needs("mp4")
    assert len(decoded(contained("mp4", 1, fps=1), num_frames=1)[1]) == 1


def test_no_frame_after_the_last_that_is_drawn_is_decoded(tmp_path: Path) -> None:
    needs("mp4")
    data = cut(streamed(tmp_path, 40), 0.6)
    count = int(str(refusal(data)).partition("after ")[2].partition(" ")[0])
    assert len(decoded(data, num_frames=count)[1]) == count
    assert len(decoded(data, seconds=count / 16, fps=16.0)[1]) == count


def refusal(data: bytes) -> InvalidPicture:
    with pytest.raises(InvalidPicture) as caught:
        decoded(data)
    return caught.value


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_tags_in_another_encoding_are_no_reason_to_refuse_a_clip(format: str) -> None:
    needs("mp4")
    data = contained(format, 3, tags={"title": "Cafe-a-tag"})
    assert b"Cafe-a-tag" in data
    data = data.replace(b"Cafe-a-tag", b"Caf\xe9-a-tag")
    assert len(decoded(data)[1]) == 3
    with pytest.raises(InvalidPicture, match="contains no recipe"):
        recipe.read_open(io.BytesIO(data), f"x.{format}")


def test_the_picture_for_those_who_cannot_play_a_png_is_no_frame() -> None:
    first, *others = frames_of(4)
    file = io.BytesIO()
    first.save(file, "PNG", save_all=True, append_images=others, default_image=True, duration=50)
    answer, frames = decoded(file.getvalue())
    assert ([frame.tobytes() for frame in frames], answer["fps"]) == ([each.tobytes() for each in others], 20)


def test_a_short_clip_takes_little_memory() -> None:
    tracemalloc.start()
    try:
        decoded(animated("GIF", 3, (16, 16)), most=100, pixels=1 << 27, size=(1024, 1024))
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


def test_a_clip_is_upright_and_on_white() -> None:
    file = io.BytesIO()
    layers = [Image.new("RGBA", (16, 16), (255, 0, 0, alpha)) for alpha in (255, 0)]
    layers[0].save(file, "WEBP", save_all=True, append_images=layers[1:], duration=50, lossless=True)
    assert [frame.getpixel((0, 0)) for frame in decoded(file.getvalue())[1]] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("format", ["mp4", "mov"])
@pytest.mark.parametrize(("shape", "size"), [(Fraction(2), (128, 48)), (Fraction(8, 9), (64, 54))])
def test_a_clip_of_pixels_that_are_no_squares_has_its_shape(
    format: str, shape: Fraction, size: tuple[int, int]
) -> None:
    answer, frames = decoded(clip(format, 3, shape=shape))
    assert (answer["size"], frames[0].size) == (size, size)
    assert unlike(frames[0], frames_of(3, (64, 48))[0].resize(size)) < 24


def test_pixels_of_an_absurd_shape_are_refused() -> None:
    with pytest.raises(InvalidPicture, match="576x48; no side"):
        decoded(clip("mp4", 3, shape=Fraction(9)))


def test_an_animation_that_rests_on_its_last_frame_has_a_rate() -> None:
    assert decoded(animated("GIF", 4, ms=[50, 50, 50, 2000]))[0]["fps"] == 20


def test_a_rate_that_changes_is_played_as_the_request_says() -> None:
    data = animated("GIF", 4, ms=[50, 50, 900, 50])
    assert len(decoded(data, fps=8.0)[1]) == 4
    needs("mp4")
    assert len(decoded(contained("mp4", 4, at_ms=(0, 50, 900, 950)), fps=8.0)[1]) == 4


def cut(data: bytes, part: float) -> bytes:
    return data[: int(len(data) * part)]


def lying(data: bytes, width: int, height: int) -> bytes:
    """A GIF that says another size in its header."""
    return data[:6] + width.to_bytes(2, "little") + height.to_bytes(2, "little") + data[10:]


def grown() -> bytes:
    """A GIF of 16x16 whose second frame is larger."""
    small, large = (animated("GIF", 1, size) for size in ((16, 16), (400, 300)))
    return small[:-1] + large[large.index(b",\0\0\0\0") :]


GIF = animated("GIF", 11)
HOSTILE: dict[str, tuple[Callable[[], bytes], dict[str, Any], str]] = {
    "nothing": (lambda: b"", {}, "not a clip in a known format .MP4, MOV, WebM"),
    "a film in AVI": (lambda: b"RIFF\x24\0\0\0AVI LIST" + b"x" * 99, {}, "not a clip in a known format .MP4"),
    "a picture": (lambda: source(32, 32), {}, "it is a picture .PNG., and a clip is needed: MP4, MOV, WebM"),
    "one frame": (lambda: animated("GIF", 1), {}, "it is a picture"),
    "a cut GIF": (lambda: cut(GIF, 0.5), {}, "damaged"),
    "a cut WebP": (lambda: cut(animated("WEBP", 11), 0.5), {}, "damaged|not a clip"),
    "a cut PNG": (lambda: cut(animated("PNG", 11), 0.5), {}, "damaged"),
    "a GIF as a screen": (lambda: lying(GIF, 4000, 4000), {}, "4000x4000; at most 1048576 pixels"),
    "thousands of tiny frames": (lambda: animated("GIF", 3000, (8, 8)), {}, "more than 64 frames, the most of 8x8"),
    "too large together": (lambda: GIF, {"pixels": 5000}, "more than 4 frames, .* max_clip_megapixels"),
    "too small": (lambda: animated("GIF", 3, (4, 4)), {}, "each side needs at least 8 pixels"),
    "a stripe": (lambda: animated("GIF", 3, (8, 200)), {}, "no side may be longer than 8 times the other"),
    "no rate": (lambda: animated("GIF", 3, ms=0), {}, "does not say its frames a second; send `fps`"),
    "a rate that changes": (lambda: animated("GIF", 4, ms=[50, 50, 900, 50]), {}, "rate changes: .* 50 to 900 ms"),
    "a frame larger than the screen": (lambda: grown(), {}, "size changes from 16x16 to 400x300"),
    "a frame for hours": (lambda: animated("PNG", 3, ms=65_535_000), {}, "has 0 frames a second; 1 to 120 are valid"),
    "a thousand a second": (lambda: animated("WEBP", 3, ms=1), {}, "has 1000 frames a second; 1 to 120 are valid"),
    "one frame of many": (lambda: GIF, {"seconds": 0.05}, "seconds: 0.05; that is one frame of the clip in video"),
    "the same at a rate": (lambda: GIF, {"seconds": 0.1, "fps": 8.0}, "seconds: 0.1; that is one frame of the clip"),
    "too short": (lambda: GIF, {"num_frames": 12}, "num_frames: 12; the clip in video has 11 frames"),
    "too short in time": (lambda: GIF, {"seconds": 1.0}, "seconds: 1; the clip in video has 11 frames, and 20 would"),
    "Matroska's mark alone": (lambda: b"\x1aE\xdf\xa3" + b"x" * 999, {}, "damaged"),
    "MP4's mark alone": (lambda: b"\0\0\0\x20ftypisom" + b"x" * 999, {}, "damaged"),
    "a playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/x.ts\n", {}, "not a clip in a known format"),
    "a list of files": (lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", {}, "not a clip in a known format"),
}  # fmt: skip
CONTAINED: dict[str, tuple[Callable[[Path], bytes], dict[str, Any], str]] = {
    "only sound": (lambda _: silent_film(), {}, "no moving pictures, only sound"),
    "one frame": (lambda _: contained("mp4", 1), {}, "it is one picture, and a clip is needed"),
    "without its end": (lambda _: cut(contained("mp4", 11), 0.9), {}, "damaged"),
    "cut off": (lambda folder: cut(streamed(folder, 40), 0.6), {}, "cut off after [0-9]+ frames"),
    "a cut WebM": (lambda _: cut(contained("webm", 40, (64, 64)), 0.6), {}, "cut off after [0-9]+ frames"),
    "without frames": (lambda folder: streamed(folder, 40)[:3000], {}, "no frame that can be decoded|cut off|damaged"),
    "another codec": (lambda _: contained("mov", 3, codec="mjpeg"), {}, "the codec mjpeg is not read; h264, hevc"),
    "too large": (lambda _: contained("mp4", 2, (2048, 1024)), {}, "2048x1024; at most 1048576 pixels"),
    "a rate that changes": (lambda _: contained("mp4", 4, at_ms=(0, 50, 900, 950)), {}, "rate changes"),
    "too many": (lambda _: contained("mp4", 65, (16, 16)), {}, "more than 64 frames"),
    "an unknown codec": (lambda _: unknown(contained("mp4", 3)), {}, "the codec in it is not read; h264, hevc"),
    "too fast": (lambda _: contained("mp4", 11, fps=240), {}, "has 240 frames a second; 1 to 120 are valid"),
    "too short": (lambda _: contained("mp4", 11), {"num_frames": 12}, "num_frames: 12; the clip in video has 11"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_animation_is_refused(name: str) -> None:
    make, drawn, words = HOSTILE[name]
    with pytest.raises(InvalidPicture, match=words):
        decoded(make(), **{"most": 64} | drawn)


@pytest.mark.parametrize("name", CONTAINED)
def test_a_hostile_film_is_refused(name: str, tmp_path: Path) -> None:
    needs("mp4")
    make, drawn, words = CONTAINED[name]
    with pytest.raises(InvalidPicture, match=words):
        decoded(make(tmp_path), **drawn)


def unknown(data: bytes) -> bytes:
    at = data.rindex(b"avc1")
    return data[:at] + b"zzzz" + data[at + 4 :]


def sized(data: bytes, size: int) -> bytes:
    """An MP4 whose header says sides of `size` pixels, in the box of its track and in that of its codec."""
    at = data.index(b"avc1")
    return data[: at + 28] + size.to_bytes(2, "big") * 2 + data[at + 32 :]


def test_frames_are_measured_and_not_believed() -> None:
    needs("mp4")
    data = contained("mp4", 11, (64, 48))
    for side in (16, 60_000):
        assert decoded(sized(data, side))[0]["size"] == (64, 48)


def test_what_is_a_clip_is_told_by_its_first_bytes() -> None:
    film, gif = b"\0\0\0\x20ftypisom\0\0\0\0" + b"x" * 99, animated("GIF", 2)
    text = base64.b64encode(film).decode()
    for moving in (film, text, f"data:video/mp4;base64,{text}", "https://x.org/a/b.MP4?token=1", "http://x.org/b.webm"):
        assert is_clip(moving) is True, moving
    for format in ("WEBP", "PNG", "AVIF"):
        data = animated(format, 2)
        assert (is_clip(data), is_clip(base64.b64encode(data).decode())) == (True, True), format
    for format in ("WEBP", "PNG", "JPEG", "AVIF", "BMP"):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, format)
        assert (is_clip(file.getvalue()), is_clip(base64.b64encode(file.getvalue()).decode())) == (False, False), format
    unknown = [gif, "https://x.org/b", "https://x.org/?a=b.mp4", "file_id:x", "%", "", b"", b"RIFF", b"\x89PNG"]
    assert [is_clip(each) for each in unknown] == [None] * len(unknown)


def run(task: str, data: bytes, settings: Settings, **options: Any) -> Any:
    async def body() -> Any:
        decoders = Decoders(settings, 1, clips=True)
        try:
            return await decoders.run(task, data, "video", **options)
        finally:
            await decoders.stop()

    return asyncio.run(body())


@pytest.mark.parametrize("format", ["GIF", "mp4"])
def test_the_decoder_is_another_process(format: str) -> None:
    data, settings = clip(format), Settings(device="cpu")
    assert run("clip_size", data, settings)[0] == {"size": [64, 48]}
    answer, pixels = run(
        "clip", data, settings, most=64, pixels=1 << 22, num_frames=5, size=[32, 16], own=[0, 0], multiple=8
    )
    assert (answer["width"], answer["height"], len(pixels)) == (32, 16, 32 * 16 * 3 * 5)
    with pytest.raises(InvalidPicture) as caught:
        run("clip", data, settings, most=64, pixels=1 << 22, num_frames=12)
    assert caught.value.param == "num_frames"


def test_the_decoder_has_a_time_and_a_memory_limit() -> None:
    slow = animated("WEBP", 60, (1000, 1000), ms=20)
    big = {"most": 64, "pixels": 1 << 30, "size": [4000, 4000]}
    with pytest.raises(InvalidPicture, match=r"the clip takes more than 6 s .6 times the setting decode_s.|memory|MiB"):
        run("clip", slow, Settings(device="cpu", decode_s=1, max_source_pixels=1 << 20, max_clip_megapixels=1), **big)
