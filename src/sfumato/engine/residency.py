"""Which models are in memory: the ones used last, up to a number; a changed model file loads anew."""

from __future__ import annotations

import gc
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from sfumato.config import ModelConfig
from sfumato.core import ModelStatus
from sfumato.engine import load
from sfumato.engine.facts import facts
from sfumato.errors import LoadError, SfumatoError

log = logging.getLogger(__name__)

PER_REQUEST: Mapping[str, Any] = {
    "aliases": (), "pinned": False, "disabled": False, "file": None, "enable_parameters": frozenset(),
    "steps": None, "quality_steps": (), "cfg_scale": None, "seed": None, "n": None, "negative_prompt": None,
    "strength": None, "width": None, "height": None, "option_lines": (), "threads": None, "max_concurrent": None,
    "retry_after": 0,
}  # fmt: skip
"""Fields that have no part in loading, with a value that stands for any."""


class Residency:
    """Loaded models by name. Used from the loop's one thread, by requests that take turns on it."""

    def __init__(
        self,
        limit: int,
        device: str,
        tell: Callable[[str, ModelStatus], None],
        dropped: Callable[[], None] = lambda: None,
    ) -> None:
        """At most `limit` models, on `device` (a setting); `dropped` is called when one has left."""
        self._limit = limit
        self._device = device
        self._tell = tell
        self._dropped = dropped
        self._loaded: OrderedDict[str, load.Loaded] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._line: deque[object] = deque()
        self.loads = 0
        """Models that were loaded so far."""
        self.evictions = 0
        """Models that left so far because another one was wanted."""

    def __len__(self) -> int:
        return len(self._loaded)

    @contextmanager
    def use(self, config: ModelConfig, turn: Callable[[], None]) -> Iterator[load.Loaded]:
        """The model, loaded if need be, and not dropped while it is in use.

        `turn` lets others go on while this one waits for room. Who came first is served first: a model
        that waits for room is not passed by requests for those that are in memory.
        """
        ticket = object()
        self._line.append(ticket)
        try:
            while self._line[0] is not ticket or not self._has_room(config):
                turn()
            model = self._get(config)
        finally:
            self._line.remove(ticket)
        self._users[config.name] += 1
        try:
            yield model
        finally:
            self._users[config.name] -= 1

    def _has_room(self, config: ModelConfig) -> bool:
        held = self._loaded.get(config.name)
        if held and _of_weights(held.config) == _of_weights(config):
            return True
        if held and self._users[config.name]:
            return False  # its file changed; those who draw with the old one finish first
        return len(self._loaded) < self._limit or self._oldest() is not None or not any(self._users.values())

    def _get(self, config: ModelConfig) -> load.Loaded:
        """The model. A failed load leaves nothing behind: the next request tries again."""
        held = self._loaded.get(config.name)
        if held and _of_weights(held.config) == _of_weights(config):
            changed, held.config = held.config != config, config
            self._loaded.move_to_end(config.name)
            if changed:  # of its defaults
                self._tell(config.name, _ready(held))
            return held
        if held:
            self._drop(config.name, "its model file changed")
        while len(self._loaded) >= self._limit and (idle := self._oldest()):
            self._evict(idle, "another model is wanted")
        try:
            self._loaded[config.name] = self._load(config)
        except SfumatoError as error:
            self._tell(config.name, ModelStatus("failed", error.message))
            raise
        self.loads += 1
        model = self._loaded[config.name]
        self._tell(config.name, _ready(model))
        return model

    def _load(self, config: ModelConfig) -> load.Loaded:
        def tell(status: ModelStatus) -> None:
            self._tell(config.name, status)

        tell(ModelStatus("loading"))
        while True:
            try:
                return load.load(config, self._device, tell)
            except (torch.OutOfMemoryError, MemoryError) as error:
                idle = self._oldest()
                if idle is None:
                    raise LoadError(
                        f"{config.name}: does not fit into memory. Try `low_vram: true`, a smaller dtype or cuda: false"
                    ) from error
            self._evict(idle, "its memory is needed")

    def _oldest(self) -> str | None:
        """The model used least recently, of those that are not pinned and not in use."""
        idle = (name for name, model in self._loaded.items() if not model.config.pinned and not self._users[name])
        return next(idle, None)

    def _evict(self, name: str, why: str) -> None:
        self.evictions += 1
        self._drop(name, why)

    def _drop(self, name: str, why: str) -> None:
        log.info("%s leaves memory: %s", name, why)
        del self._loaded[name]
        self._dropped()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._tell(name, ModelStatus("unloaded", why))


def _ready(model: load.Loaded) -> ModelStatus:
    try:
        return ModelStatus("ready", facts=facts(model))
    except Exception:  # a pipeline like no other may still draw
        log.exception("%s: what it can do is not known", model.config.name)
        return ModelStatus("ready")


def _of_weights(config: ModelConfig) -> ModelConfig:
    """The config less what each request reads anew: a change of these alone loads nothing."""
    return replace(config, **PER_REQUEST)
