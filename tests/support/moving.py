"""Clips to draw from: frames, and files of them in every format that is read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfumato.core import SourceClip


def frames_of(count: int, size: tuple[int, int] = (32, 32)) -> list[Image.Image]:
    """Blocks of colours, others in every frame; the same ones every time."""
    width, height = size
    shape = (-(-height // 8), -(-width // 8), 3)
    blocks = (np.random.default_rng(index).integers(0, 256, shape, np.uint8) for index in range(count))
    return [Image.fromarray(each.repeat(8, 0).repeat(8, 1)[:height, :width]) for each in blocks]


def source_clip(count: int, fps: float = 12.0, size: tuple[int, int] = (32, 32)) -> SourceClip:
    """As the service decodes it."""
    pixels = b"".join(frame.tobytes() for frame in frames_of(count, size))
    return SourceClip(pixels, *size, fps, size, hashlib.sha256(pixels).hexdigest())


def animated(format: str, count: int, size: tuple[int, int] = (32, 32), ms: int | Sequence[int] = 50) -> bytes:
    """By Pillow. `ms`: how long each frame lasts; in a WebP and a PNG the pixels are kept as they are."""
    file = io.BytesIO()
    first, *others = frames_of(count, size)
    more = {"lossless": True} if format == "WEBP" else {}
    first.save(file, format, save_all=True, append_images=others, duration=ms, loop=0, **more)
    return file.getvalue()


def contained(
    format: str,
    count: int,
    size: tuple[int, int] = (32, 32),
    *,
    fps: int = 16,
    at_ms: Sequence[int] = (),
    codec: str = "",
    options: Mapping[str, str] | None = None,
    sound_s: float = 0.0,
    tags: Mapping[str, str] | None = None,
    shape: Fraction | None = None,
) -> bytes:
    """By PyAV. `at_ms`: when each frame begins, of a clip whose rate changes. `sound_s`: seconds of silence beside.
    `shape`: width : height of each pixel."""
    import av

    file = io.BytesIO()
    name = codec or {"webm": "libvpx-vp9"}.get(format, "libx264")
    with av.open(file, "w", format=format, options=dict(options or {})) as container:
        stream: Any = container.add_stream(name, fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if name == "mjpeg" else "yuv420p"
        if shape:
            stream.codec_context.sample_aspect_ratio = shape
        container.metadata.update(tags or {})
        sound: Any = container.add_stream("libopus", 48_000, layout="mono") if sound_s else None
        if at_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, image in enumerate(frames_of(count, size)):
            frame = av.VideoFrame.from_image(image)
            if at_ms:
                frame.pts, frame.time_base = at_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, round(48_000 * sound_s)), np.float32), "flt", "mono")
            frame.sample_rate = 48_000
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
    return file.getvalue()


def streamed(folder: Path, count: int) -> bytes:
    """An MP4 that says what it has before its frames, as files to download are."""
    import av

    path = folder / "streamed.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", 16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for image in frames_of(count, (64, 64)):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path.read_bytes()


def silent_film() -> bytes:
    """An MP4 of sound alone."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", 48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
