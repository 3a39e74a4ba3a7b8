"""The models in memory: the most recently used ones, up to a limit; a changed model file is reloaded."""

from __future__ import annotations

import gc
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sfumato.batching import offload
from sfumato.batching.batcher import is_out_of_memory
from sfumato.config import ModelConfig
from sfumato.core import ModelInfo, ModelStatus
from sfumato.errors import LoadError, SfumatoError
from sfumato.models import load
from sfumato.models.release import release_frames
from sfumato.sampling import Sampling

log = logging.getLogger(__name__)

UNLOAD_REQUESTED = "unloading was requested"

PER_REQUEST: Mapping[str, Any] = {
    "aliases": (), "pinned": False, "disabled": False, "file": None, "enable_parameters": frozenset(),
    "quality_steps": (), "seed": None, "n": None, "option_lines": (), "locked": frozenset(),
    "threads": None, "max_concurrent": None,
    "retry_after": 0,
}  # fmt: skip
"""Fields without effect on loading, with a value that replaces them in comparisons."""


class ModelPool:
    """Loaded models by name. Used only on the loop's thread, by requests that take turns on it."""

    def __init__(
        self,
        limit: int,
        device: str,
        on_status: Callable[[str, ModelStatus], None],
        dropped: Callable[[], None] = lambda: None,
        free_caches: Callable[[], int] = lambda: 0,
        describe: Callable[[load.Loaded], ModelInfo | None] = lambda model: None,
    ) -> None:
        """Hold at most `limit` models, on `device` (a setting); `dropped` is called after one was unloaded.

        `free_caches` drops the engine's caches and returns the bytes freed, for a model that does not fit.
        `describe` returns a model's capabilities.
        """
        self._limit = limit
        self._device = device
        self._on_status = on_status
        self._dropped = dropped
        self._free_caches = free_caches
        self._describe = describe
        self._loaded: OrderedDict[str, load.Loaded] = OrderedDict()
        self._newest: dict[str, ModelConfig] = {}
        """Loaded model → the config of its latest request."""
        self._users: Counter[str] = Counter()
        self._pins: dict[str, bool] = {}
        """Model → whether it is pinned, if a request overrode its model file."""
        self._to_unload: set[str] = set()
        """Models to unload as soon as no request uses them."""
        self._queue: deque[object] = deque()
        self.loads = 0
        """Models loaded so far."""
        self.evictions = 0
        """Models unloaded so far to make room for another."""

    def __len__(self) -> int:
        return len(self._loaded)

    @contextmanager
    def use(self, config: ModelConfig, turn: Callable[[], None]) -> Iterator[load.Loaded]:
        """The model for this `config`, loaded if necessary, and not unloaded while in use.

        `turn` lets other requests continue while this one waits for room. First come, first served: requests for
        loaded models do not overtake a model that waits for room.
        """
        ticket = object()
        self._queue.append(ticket)
        try:
            while self._queue[0] is not ticket or not self._has_room(config):
                turn()
            model = self._get(config)
        finally:
            self._queue.remove(ticket)
        self._users[config.name] += 1
        try:
            yield model
        finally:
            self._users[config.name] -= 1
            if not self._users[config.name]:
                self._become_idle(config.name)
                if config.name in self._to_unload:
                    self._unload(config.name, UNLOAD_REQUESTED)

    def unload(self, name: str | None) -> None:
        """Unload a model (None: all), pinned or not, once no request uses it."""
        for model in [name] if name is not None else list(self._loaded):
            if model in self._loaded and self._users[model]:
                self._to_unload.add(model)
            elif model in self._loaded:
                self._unload(model, UNLOAD_REQUESTED)

    def pin(self, name: str, pinned: bool) -> None:
        self._pins[name] = pinned

    def _has_room(self, config: ModelConfig) -> bool:
        loaded = self._loaded.get(config.name)
        if loaded and _serves(loaded, config):
            return True
        if loaded and self._users[config.name]:
            return False  # it must be reloaded; requests that use the old one finish first
        return len(self._loaded) < self._limit or self._oldest() is not None or not any(self._users.values())

    def _get(self, config: ModelConfig) -> load.Loaded:
        """The model. A failed load leaves nothing behind: the next request tries again."""
        loaded = self._loaded.get(config.name)
        if loaded and _serves(loaded, config):
            self._loaded.move_to_end(config.name)
            self._to_unload.discard(config.name)  # it is requested again
            changed, self._newest[config.name] = self._newest[config.name] != config, config
            if not self._users[config.name]:
                loaded.config = config
            # Running requests keep the model file they were made with.
            model = loaded if loaded.config == config else replace(loaded, config=config)
            if changed:  # a default of requests changed
                self._on_status(config.name, self._ready(model))
            return model
        if loaded:
            self._unload(config.name, loaded.state.broken or "its model file changed")
        while len(self._loaded) >= self._limit and (idle := self._oldest()):
            self._evict(idle, "another model needs its place")
        try:
            self._loaded[config.name] = self._load(config)
        except SfumatoError as error:
            self._on_status(config.name, ModelStatus("failed", error.message))
            raise
        self.loads += 1
        self._newest[config.name] = config
        model = self._loaded[config.name]
        self._on_status(config.name, self._ready(model))
        return model

    def _load(self, config: ModelConfig) -> load.Loaded:
        def on_status(status: ModelStatus) -> None:
            self._on_status(config.name, status)

        on_status(ModelStatus("loading"))
        while True:
            try:
                return load.load(config, self._device, on_status)
            except Exception as error:  # torch's CPU allocator raises a plain RuntimeError
                if not is_out_of_memory(error):
                    raise
                release_frames(error)
            gc.collect()
            if not self._free_caches() and not self._evict_idle():
                raise LoadError(
                    f"{config.name}: does not fit into memory. Try `low_vram: true`, a smaller dtype or cuda: false"
                )
            offload.empty_cache()

    def _ready(self, model: load.Loaded) -> ModelStatus:
        try:
            return ModelStatus("ready", info=self._describe(model))
        except Exception:  # an unusual pipeline may still be able to draw
            log.exception("%s: its capabilities could not be read", model.config.name)
            return ModelStatus("ready")

    def _evict_idle(self) -> bool:
        idle = self._oldest()
        if idle is not None:
            self._evict(idle, "its memory is needed")
        return idle is not None

    def _become_idle(self, name: str) -> None:
        """Called when the last request using the model has ended."""
        model = self._loaded[name]
        model.config = self._newest[name]
        try:
            offload.offload_all(model.pipeline)
        except Exception as error:  # whatever a module raises when it is moved
            log.exception("%s: its modules could not be put into main memory", name)
            model.state.broken = f"its modules could not be put into main memory: {error}"

    def _oldest(self) -> str | None:
        """The least recently used model that is neither pinned nor in use."""
        idle = (name for name, model in self._loaded.items() if not self._pinned(model) and not self._users[name])
        return next(idle, None)

    def _pinned(self, model: load.Loaded) -> bool:
        return self._pins.get(model.config.name, model.config.pinned)

    def _evict(self, name: str, reason: str) -> None:
        self.evictions += 1
        self._unload(name, reason)

    def _unload(self, name: str, reason: str) -> None:
        log.info("%s was unloaded: %s", name, reason)
        del self._loaded[name], self._newest[name]
        self._to_unload.discard(name)
        self._dropped()
        gc.collect()
        offload.empty_cache()
        for model in self._loaded.values():  # there is more room now: models that did not fit may fit
            model.state.tiled_from = None
        self._on_status(name, ModelStatus("unloaded", reason))


def _serves(model: load.Loaded, config: ModelConfig) -> bool:
    """Whether the loaded model can serve a request with `config`."""
    return not model.state.broken and _loading_config(model.config) == _loading_config(config)


def _loading_config(config: ModelConfig) -> ModelConfig:
    """The config without the fields that each request reads itself: changing only those does not reload."""
    sampling = Sampling(scheduler=config.sampling.scheduler, clip_skip=config.sampling.clip_skip)  # `load` checks these
    return replace(config, **PER_REQUEST, sampling=sampling)
