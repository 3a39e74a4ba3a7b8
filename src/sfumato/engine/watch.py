"""When a run shows itself: at which steps, what of a step's result, and to whom."""

from __future__ import annotations

import functools
import io
import logging
import typing
import weakref
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from PIL import Image

from sfumato.core import MAX_PREVIEWS, Preview
from sfumato.engine import threadstate
from sfumato.engine.preview import Glance, preview

log = logging.getLogger(__name__)

OnPreview: TypeAlias = Callable[[Preview], None]
"""Called with each preview; may raise to stop the run."""

CLEAN = ("pred_original_sample", "denoised")
"""What schedulers call their guess at the end of the run; it shows more than the noisy sample does."""


class Previews:
    """The previews of one run, `count` of them, evenly spread over its steps and never at the last."""

    def __init__(
        self,
        pipeline: Any,
        count: int,
        width: int | None,
        height: int | None,
        on_preview: OnPreview,
        glance: Glance | None = None,
    ) -> None:
        # Weak: its scheduler holds this, and a pipeline that is part of a cycle keeps its weights in memory.
        self._pipeline = weakref.ref(pipeline)
        self._left = min(count, MAX_PREVIEWS)
        self._count = self._left
        self._size = (width, height)
        self._on_preview = on_preview
        self._glance = glance

    def after(self, step: int, total: int, scheduler: Any, result: Any) -> None:
        """To be called after each of `total` steps with what the scheduler returned. The first failure is the last."""
        index = due(step, total, self._count)
        pipeline = self._pipeline()
        if index is None or not self._left or pipeline is None:
            return
        png = None
        found = threadstate.random()
        try:
            latents = sample(scheduler, result)
            image = None if latents is None else preview(pipeline, latents, *self._size, self._glance)
            png = None if image is None else _png(image)
        except Exception as error:  # nothing that a preview meets may reach the request
            log.debug("%s shows no previews: %r", type(pipeline).__name__, error)
        finally:
            threadstate.set_random(found)
        if png is None:
            self._left = 0
            return
        self._left -= 1
        self._on_preview(Preview(index, step, total, png))


def due(step: int, total: int, count: int) -> int | None:
    """Which of `count` previews (0 is the first) belongs to `step` of `total`, if one does."""
    shown = min(count, total - 1)
    return next((index for index in range(shown) if total * (index + 1) // (shown + 1) == step), None)


def sample(scheduler: Any, result: Any) -> torch.Tensor | None:
    """Of what `scheduler.step` returned: the predicted clean sample if it is there, else the next noisy one."""
    named: dict[str, Any]
    if isinstance(result, tuple):
        kind: Any = type(scheduler)
        named = dict(zip(_names(kind), result, strict=False)) | {"prev_sample": result[0]}
    else:
        named = vars(result)
    noisy = named.get("prev_sample")
    if not isinstance(noisy, torch.Tensor):
        return None
    clean = [*(named.get(name) for name in CLEAN), predicted(scheduler)]
    return next((each for each in clean if isinstance(each, torch.Tensor) and each.shape == noisy.shape), noisy)


def predicted(scheduler: Any) -> Any:
    """The newest guess at the clean sample of a multistep solver, which keeps but does not return it; or None."""
    config = getattr(scheduler, "config", {})
    if not (config.get("predict_x0") or str(config.get("algorithm_type")).endswith("dpmsolver++")):
        return None
    return next(reversed(getattr(scheduler, "model_outputs", None) or ()), None)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    # Blurred pictures hold no repetitions: looking for them takes longer and gains nothing.
    image.save(file, "PNG", compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY)
    return file.getvalue()


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    """Names of what the tuple has that a scheduler's `step` returns: those of the class it returns otherwise."""
    try:
        kinds = typing.get_args(typing.get_type_hints(kind.step)["return"])
    except (NameError, KeyError, TypeError):
        return ()
    return next((tuple(field.name for field in fields(each)) for each in kinds if is_dataclass(each)), ())
