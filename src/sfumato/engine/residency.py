"""Which models are in memory: the ones used last, up to a number; a changed model file loads anew."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable

import torch

from sfumato.config import ModelConfig
from sfumato.core import ModelStatus
from sfumato.engine import load
from sfumato.errors import LoadError, SfumatoError

log = logging.getLogger(__name__)


class Residency:
    """Loaded models by name. Used from the loop's one thread."""

    def __init__(self, limit: int, device: str, tell: Callable[[str, ModelStatus], None]) -> None:
        self._limit = limit
        self._device = device
        self._tell = tell
        self._loaded: OrderedDict[str, load.Loaded] = OrderedDict()

    def get(self, config: ModelConfig) -> load.Loaded:
        """The model, loaded if need be. A failed load leaves nothing behind: the next request tries again."""
        held = self._loaded.get(config.name)
        if held and held.config == config:
            self._loaded.move_to_end(config.name)
            return held
        if held:
            self._drop(config.name, "its model file changed")
        while len(self._loaded) >= self._limit:
            self._drop(next(iter(self._loaded)), "another model is wanted")
        try:
            self._loaded[config.name] = self._load(config)
        except SfumatoError as error:
            self._tell(config.name, ModelStatus("failed", error.message))
            raise
        self._tell(config.name, ModelStatus("ready"))
        return self._loaded[config.name]

    def _load(self, config: ModelConfig) -> load.Loaded:
        def tell(status: ModelStatus) -> None:
            self._tell(config.name, status)

        tell(ModelStatus("loading"))
        while True:
            try:
                return load.load(config, self._device, tell)
            except (torch.OutOfMemoryError, MemoryError) as error:
                if not self._loaded:
                    raise LoadError(
                        f"{config.name}: does not fit into memory. Try `low_vram: true`, a smaller dtype, or cuda: false."
                    ) from error
            self._drop(next(iter(self._loaded)), "its memory is needed")

    def _drop(self, name: str, why: str) -> None:
        log.info("%s leaves memory: %s", name, why)
        del self._loaded[name]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._tell(name, ModelStatus("unloaded", why))
