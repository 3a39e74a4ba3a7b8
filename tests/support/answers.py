"""What an HTTP answer has in it."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import numpy as np
from PIL import Image


def image_of(answer: httpx.Response, index: int = 0) -> Image.Image:
    assert answer.status_code == 200, answer.text
    item = answer.json()["data"][index]
    data = base64.b64decode(item["b64_json"]) if "b64_json" in item else httpx.get(item["url"]).content
    return Image.open(io.BytesIO(data))


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-should-retry"] in ("true", "false")
    return error


def pixels(image: Image.Image) -> Any:
    return np.asarray(image)
