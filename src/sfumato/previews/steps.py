"""When a run sends previews: at which steps, and from which part of a step's result."""

from __future__ import annotations

import functools
import io
import logging
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

from PIL import Image

from sfumato.batching import torch_state
from sfumato.core import MAX_PREVIEWS, Preview
from sfumato.pictures.encoder import HERE, Encoder
from sfumato.previews.decode import CheapDecoder, MakePicture, PreviewImage, decoded
from sfumato.previews.x0 import StepResult, x0_or_sample

log = logging.getLogger(__name__)

OnPreview: TypeAlias = Callable[[Preview], None]
"""Called with each preview; may raise to stop the run."""


class RunPreviews:
    """The `count` previews of one run, spread evenly over its steps; never at the last step."""

    def __init__(
        self,
        pipeline: Any,
        count: int,
        width: int | None,
        height: int | None,
        on_preview: OnPreview,
        cheap_decoder: CheapDecoder | None = None,
        kept: tuple[int, int, int, int] | None = None,
        encoder: Encoder = HERE,
    ) -> None:
        """`kept`: left, top, right and bottom of the part that the final picture keeps, in pixels; None: all of it.

        `encoder`: makes and encodes the pictures, and calls `on_preview`.
        """
        # Weak: its scheduler refers to this object, and a reference cycle would keep the pipeline's weights in memory.
        self._pipeline = weakref.ref(pipeline)
        self._remaining = min(count, MAX_PREVIEWS)
        self._count = self._remaining
        self._size = (width, height)
        self._on_preview = on_preview
        self._cheap_decoder = cheap_decoder
        self._kept = kept
        self._encoder = encoder

    def after(self, step: int, total: int, step_result: StepResult) -> None:
        """Call this after each of `total` steps. After one failure no more previews are tried."""
        index = due(step, total, self._count)
        pipeline = self._pipeline()
        if index is None or not self._remaining or pipeline is None:
            return
        make = None
        random_state = torch_state.random()
        try:
            latents = x0_or_sample(step_result)
            make = None if latents is None else decoded(pipeline, latents, *self._size, self._cheap_decoder)
        except Exception as error:  # a failing preview must not affect its request
            log.debug("no previews for %s: %r", type(pipeline).__name__, error)
        finally:
            torch_state.set_random(random_state)
        if make is None:
            self._remaining = 0
            return
        self._remaining -= 1
        self._encoder.later(functools.partial(self._send, make, (index, step, total)))

    def _send(self, make: MakePicture, which: tuple[int, int, int]) -> None:
        """On an accelerator `make` waits for the device."""
        try:
            small = make()
        except Exception as error:
            log.debug("no more previews: %r", error)
            small = None
        if small is None:
            self._remaining = 0
            return
        if self._kept:
            small = _part(small, self._kept)
        self._on_preview(Preview(*which, _png(small.image), small.width, small.height))


def due(step: int, total: int, count: int) -> int | None:
    """Which of `count` previews (0 is the first) belongs to `step` of `total`, if any."""
    possible = min(count, total - 1)
    return next((index for index in range(possible) if total * (index + 1) // (possible + 1) == step), None)


def _part(whole: PreviewImage, kept: tuple[int, int, int, int]) -> PreviewImage:
    """The part of a preview for this part of the picture, in pixels of the picture."""
    width, height = kept[2] - kept[0], kept[3] - kept[1]
    across, down = whole.image.width / whole.width, whole.image.height / whole.height
    size = max(1, round(width * across)), max(1, round(height * down))
    box = (kept[0] * across, kept[1] * down, kept[2] * across, kept[3] * down)
    return PreviewImage(whole.image.resize(size, Image.Resampling.BILINEAR, box), width, height)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
