"""When a run sends previews: at which steps, and from which part of a step's result."""

from __future__ import annotations

import io
import logging
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

from PIL import Image

from sfumato.batching import torch_state
from sfumato.core import MAX_PREVIEWS, Preview
from sfumato.previews.decode import CheapDecoder, preview
from sfumato.previews.x0 import Stepped, sample

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
        glance: CheapDecoder | None = None,
    ) -> None:
        # Weak: its scheduler refers to this object, and a reference cycle would keep the pipeline's weights in memory.
        self._pipeline = weakref.ref(pipeline)
        self._left = min(count, MAX_PREVIEWS)
        self._count = self._left
        self._size = (width, height)
        self._on_preview = on_preview
        self._glance = glance

    def after(self, step: int, total: int, stepped: Stepped) -> None:
        """Call this after each of `total` steps. After one failure no more previews are tried."""
        index = due(step, total, self._count)
        pipeline = self._pipeline()
        if index is None or not self._left or pipeline is None:
            return
        sight = None
        found = torch_state.random()
        try:
            latents = sample(stepped)
            sight = None if latents is None else preview(pipeline, latents, *self._size, self._glance)
        except Exception as error:  # a failing preview must not affect its request
            log.debug("no previews for %s: %r", type(pipeline).__name__, error)
        finally:
            torch_state.set_random(found)
        if sight is None:
            self._left = 0
            return
        self._left -= 1
        self._on_preview(Preview(index, step, total, _png(sight.image), sight.width, sight.height))


def due(step: int, total: int, count: int) -> int | None:
    """Which of `count` previews (0 is the first) belongs to `step` of `total`, if any."""
    shown = min(count, total - 1)
    return next((index for index in range(shown) if total * (index + 1) // (shown + 1) == step), None)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
