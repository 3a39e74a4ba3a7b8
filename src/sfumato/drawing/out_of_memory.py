"""Out-of-memory fallbacks for a request that already runs alone: retry it with less memory, step by step.

The earlier fallbacks are the batcher's: it drops its caches, then halves the rows of a batch that did not fit, and
remembers the limit. A fallback that changes pixels applies to the request and is recorded in its recipe.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from sfumato.batching import offload
from sfumato.batching.batcher import is_out_of_memory
from sfumato.core import VAE_TILING, Generation
from sfumato.drawing.arguments import own_size
from sfumato.errors import DrawError
from sfumato.models.load import OFFLOADED, TILES, Loaded
from sfumato.models.release import release_frames
from sfumato.pictures import images
from sfumato.pipelines.tiling import can_tile

log = logging.getLogger(__name__)

T = TypeVar("T")


def with_less(
    model: Loaded, asked: Generation, draw: Callable[[Generation], T], spare: Callable[[], int] = lambda: 0
) -> T:
    """Run `draw(asked)`, and again after each fallback while it runs out of memory. Raises DrawError if none is left.

    `spare` drops the engine's caches and returns the bytes freed.
    """
    pixels, known = _pixels(model, asked), model.state.tiled_from
    if known is not None and pixels >= known:
        asked = _tiled(asked)
    spared = False
    while True:
        try:
            return draw(asked)
        except Exception as error:  # torch's CPU allocator raises a plain RuntimeError
            if not is_out_of_memory(error):
                raise
            release_frames(error)
        gc.collect()
        freed = spare()
        offload.empty_cache()
        if freed and not spared:
            spared = True
            log.warning("%s ran out of memory; dropped %d bytes of cached results", model.config.name, freed)
        elif VAE_TILING not in asked.savings and can_tile(model.pipeline):
            asked = _tiled(asked)
            model.state.tiled_from = pixels if known is None else min(pixels, known)
            _note(model, TILES)
        elif _offload(model):
            _note(model, OFFLOADED)
        else:
            raise DrawError(
                f"{model.config.name}: out of memory, even with the VAE in tiles"
                f"{'' if model.device == 'cpu' else ' and modules in main memory'}. Request a smaller size, or set a "
                "smaller dtype in the model file."
            )


def _note(model: Loaded, rung: str) -> None:
    if rung not in model.fallbacks:
        log.warning("%s ran out of memory; from now on %s", model.config.name, rung)
    model.fallbacks.add(rung)


def _tiled(asked: Generation) -> Generation:
    return replace(asked, savings=tuple(sorted({*asked.savings, VAE_TILING})))


def _offload(model: Loaded) -> bool:
    if model.device == "cpu" or offload.enabled(model.pipeline):
        return False
    offload.enable(model.pipeline, model.device)
    return True


def _pixels(model: Loaded, asked: Generation) -> float:
    """Approximate pixels of the picture to draw, to tell large from small; infinite if unknown."""
    if size := asked.sampling.size:
        return math.prod(size)
    if asked.images:
        return math.prod(images.size(asked.images[0])) * (asked.upscale or 1) ** 2
    width, height = own_size(model)
    return width * height if width and height else math.inf
