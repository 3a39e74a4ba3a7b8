"""Thumbnails of the store's files: of a picture, or of the first frame of a clip. A sound has none."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from sfumato.pictures import containers


def thumbnail(file: bytes, name: str, side: int) -> bytes | None:
    """A file of ours as WebP, at most `side` pixels per side, without its recipe; None if it cannot be shown so.

    Its suffix in `name` says what it is.
    """
    try:
        with _first_frame(file) if Path(name).suffix in containers.SUFFIXES else _picture(file) as image:
            image.draft("RGB", (side, side))  # decode a JPEG at reduced size
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            small = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    except (OSError, ValueError, SyntaxError, ImportError, StopIteration, Image.DecompressionBombError):
        return None
    answer = io.BytesIO()
    small.save(answer, "WEBP", quality=85)
    return answer.getvalue()


def _picture(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file), formats=("PNG", "WEBP", "JPEG", "GIF"))


def _first_frame(file: bytes) -> Image.Image:
    """Raises StopIteration if there is none."""
    with containers.opened(io.BytesIO(file)) as container:
        frames = container.decode(video=0) if container.streams.video else iter(())
        image: Image.Image = next(frames).to_image()
    return image
