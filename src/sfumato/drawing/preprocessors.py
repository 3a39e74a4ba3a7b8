"""Control pictures made of ordinary ones: edges for a ControlNet that was trained on edges. At the drawn size."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from PIL import Image, ImageOps

from sfumato.core import CANNY, INVERT, Control
from sfumato.errors import InvalidRequest

THRESHOLDS = (100.0, 200.0)
"""Of the edges, in levels of 0 .. 255: those that ControlNets were trained with."""


def applied(controls: Sequence[Control], pictures: Sequence[Image.Image]) -> tuple[Image.Image, ...]:
    """The control pictures (RGB), each by what its control asks for. Raises InvalidRequest if that is not installed."""
    return tuple(
        _PREPROCESSORS[control.preprocess](picture, control, f"controls[{number}].preprocess")
        if control.preprocess
        else picture
        for number, (control, picture) in enumerate(zip(controls, pictures, strict=True))
    )


def _canny(picture: Image.Image, control: Control, param: str) -> Image.Image:
    """White edges on black."""
    try:
        cv2 = importlib.import_module("cv2")  # not an import statement: the package is an extra
    except ImportError:
        raise InvalidRequest(
            f"{param}: canny needs the package opencv-python-headless: pip install 'sfumato[preprocess]'; or send a "
            "picture of edges, without preprocess",
            param=param,
        ) from None
    import numpy as np

    low, high = control.thresholds or THRESHOLDS
    return Image.fromarray(cv2.Canny(np.asarray(picture), low, high)).convert("RGB")


def _inverted(picture: Image.Image, control: Control, param: str) -> Image.Image:
    """For drawings that are black on white."""
    return ImageOps.invert(picture)


_PREPROCESSORS: Mapping[str, Callable[[Image.Image, Control, str], Image.Image]] = MappingProxyType(
    {CANNY: _canny, INVERT: _inverted}
)
