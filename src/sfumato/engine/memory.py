"""Out of memory, when a request has a forward to itself: the same request again with less, rung by rung.

The rungs before these are the hub's: it halves the rows of a batch that did not fit, and remembers.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from sfumato.engine.batching import is_out_of_memory
from sfumato.engine.load import Loaded
from sfumato.errors import DrawError

log = logging.getLogger(__name__)

T = TypeVar("T")


def _tile(model: Loaded) -> bool:
    vae = getattr(model.pipeline, "vae", None)
    if vae is None or not hasattr(vae, "enable_tiling"):
        return False
    vae.enable_slicing()
    vae.enable_tiling()
    return True


def _offload(model: Loaded) -> bool:
    if model.device == "cpu":
        return False
    model.pipeline.enable_model_cpu_offload(device=model.device)
    return True


RUNGS: Mapping[str, Callable[[Loaded], bool]] = {
    "its VAE works in slices and tiles": _tile,
    "its modules wait in main memory": _offload,
}
"""What makes a model need less; each says whether it could be done. They hold until the model is loaded anew."""


def with_less(model: Loaded, draw: Callable[[], T]) -> T:
    """`draw()`, again after each rung while it runs out of memory. Raises DrawError when none is left."""
    while True:
        try:
            return draw()
        except Exception as error:  # torch's CPU allocator raises a plain RuntimeError
            if not is_out_of_memory(error):
                raise
            # The traceback holds every tensor of the failed run.
            error.__traceback__ = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not _step_down(model):
            raise DrawError(
                f"{model.config.name}: out of memory, also with the VAE in tiles"
                f"{'' if model.device == 'cpu' else ' and modules in main memory'}. Ask for a smaller size, or set a "
                "smaller dtype in the model file."
            )


def _step_down(model: Loaded) -> bool:
    for words, rung in RUNGS.items():
        if words in model.rungs:
            continue
        model.rungs.add(words)
        if rung(model):
            log.warning("%s ran out of memory; from now on %s", model.config.name, words)
            return True
    return False
