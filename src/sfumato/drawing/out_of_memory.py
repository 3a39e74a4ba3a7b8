"""Out-of-memory fallbacks for a request that already runs alone: retry it with less memory, step by step.

The earlier fallbacks are the batcher's: it drops its caches, then halves the rows of a batch that did not fit, and
remembers the limit. A fallback that changes pixels applies to the request and is recorded in its recipe.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from sfumato.batching import offload
from sfumato.batching.batcher import is_out_of_memory
from sfumato.core import VAE_TILING, Generation
from sfumato.drawing import clips
from sfumato.drawing.arguments import own_size
from sfumato.errors import OutOfMemory
from sfumato.formats import AUDIO, IMAGE, VIDEO, kind_of
from sfumato.models import low_memory, precision, sharing
from sfumato.models.load import Loaded
from sfumato.models.release import release_frames
from sfumato.pictures import images
from sfumato.pipelines.tiling import can_tile

log = logging.getLogger(__name__)

TILES = "its VAE works in slices and tiles"
OFFLOADED = "its modules wait in main memory"
GROUPED = "its layers wait in main memory"
"""Descriptions of the fallbacks that a model may be using; `ModelState` has them."""

LESS: Mapping[str, str] = MappingProxyType(
    {IMAGE: "a smaller size", VIDEO: "a smaller size or fewer frames", AUDIO: "fewer seconds"}
)
"""Kind of a result -> what of it takes less memory."""

FROM_NOW_ON = "%s ran out of memory; from now on %s"

T = TypeVar("T")


def with_less(
    model: Loaded,
    generation: Generation,
    draw: Callable[[Generation], T],
    free_caches: Callable[[], int] = lambda: 0,
    let_long_calls_end: Callable[[], None] = lambda: None,
) -> T:
    """Run `draw(generation)`, and again after each fallback while memory runs out. Raises OutOfMemory if none is left.

    `free_caches` drops the engine's caches and returns the bytes freed. `let_long_calls_end` returns when no other
    request is inside a module.
    """
    pixels, tiled_from = _pixels(model, generation), model.state.tiled_from
    if tiled_from is not None and pixels >= tiled_from:
        generation = _tiled(generation)
    caches_freed = False
    while True:
        try:
            return draw(generation)
        except Exception as error:  # torch's CPU allocator raises a plain RuntimeError
            if not is_out_of_memory(error):
                raise
            release_frames(error)
        gc.collect()
        freed = free_caches() + model.state.adapters.drop()
        offload.empty_cache()
        if freed and not caches_freed:
            caches_freed = True
            log.warning("%s ran out of memory; dropped %d bytes of cached results and LoRAs", model.config.name, freed)
        elif VAE_TILING not in generation.savings and _may_tile(model):
            generation = _tiled(generation)
            if model.state.tiled_from is None:
                log.warning(FROM_NOW_ON, model.config.name, TILES)
            model.state.tiled_from = pixels if tiled_from is None else min(pixels, tiled_from)
        elif fallback := _offload(model, let_long_calls_end):
            log.warning(FROM_NOW_ON, model.config.name, fallback)
        else:
            in_effect = ", ".join(sorted({*generation.savings, *model.savings}))
            raise OutOfMemory(
                f"{model.config.name}: out of memory{f', even with {in_effect}' if in_effect else ''}. Request "
                f"{LESS[kind_of(generation.format)]}, or set `quantization`, `layerwise_casting` or a smaller dtype in "
                "the model file."
            )


def _tiled(generation: Generation) -> Generation:
    return replace(generation, savings=tuple(sorted({*generation.savings, VAE_TILING})))


def _may_tile(model: Loaded) -> bool:
    """Whether the VAE is not in tiles already, and neither the file nor its class is against it."""
    return model.config.vae_tiling is None and can_tile(model.pipeline)


def _offload(model: Loaded, let_long_calls_end: Callable[[], None]) -> str:
    """Keep less of the weights on the device from now on: the fallback, or an empty string if none is left."""
    if model.device.startswith("cpu") or model.config.offload == "none" or model.state.offload == "group":
        return ""
    before = model.state.offload
    let_long_calls_end()  # weights must not move while a module computes with them
    state = model.state
    if state.offload != before:  # another request ran out of memory meanwhile
        return GROUPED if state.offload == "group" else OFFLOADED
    sharing.unshare(model.pipeline)
    model.task_pipelines.clear()
    model.state.kept = ()  # its tensors are the pipeline's, which now move
    if model.state.offload == "none" and low_memory.is_ordered(model.pipeline):
        offload.enable(model.pipeline, model.device)
        model.state.offload = "model"
        return OFFLOADED
    offload.enable_groups(model.pipeline, model.device, precision.is_denoiser)
    model.state.offload = "group"
    return GROUPED


def _pixels(model: Loaded, generation: Generation) -> float:
    """Approximate pixels of the picture or clip to draw, to tell large from small; infinite if unknown."""
    frames = clips.frames(model, generation) if kind_of(generation.format) == VIDEO else 1
    return frames * _pixels_of_picture(model, generation)


def _pixels_of_picture(model: Loaded, generation: Generation) -> float:
    second = generation.hires.sampling.size if generation.hires else None
    if sizes := [size for size in (generation.sampling.size, second) if size]:
        return max(math.prod(size) for size in sizes)
    if generation.images:
        return math.prod(images.size(generation.images[0])) * (generation.upscale or 1) ** 2
    if generation.clip:
        return generation.clip.width * generation.clip.height
    width, height = own_size(model)
    return width * height if width and height else math.inf
