"""Pictures as clients send them."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def base64_of(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    return base64.b64encode(encoded(image, format, **options)).decode()


def uri(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    return f"data:image/{format.lower()};base64,{base64_of(image, format, **options)}"
