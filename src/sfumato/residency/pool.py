"""The models in memory: the most recently used ones, up to a limit and a budget; a changed model file is reloaded."""

from __future__ import annotations

import copy
import gc
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from sfumato import allocator
from sfumato.batching import cpu_threads, offload
from sfumato.batching.batcher import is_out_of_memory
from sfumato.config import ModelConfig
from sfumato.core import ModelInfo, ModelStatus
from sfumato.errors import Cancelled, LoadError, ModelTooLarge, TooManyRequests
from sfumato.models import controlnets, footprint, load
from sfumato.models.release import release_frames
from sfumato.models.sharing import Sharing
from sfumato.residency import lora_room, reload
from sfumato.residency.budget import Budget
from sfumato.residency.idle_times import IdleTimes
from sfumato.residency.loading import CANCELLED, Loading
from sfumato.residency.turns import Turns

log = logging.getLogger(__name__)

UNLOAD_REQUESTED = "unloading was requested"
NO_ROOM = "{} does not fit beside the models in use; try again when fewer requests are drawn"
RETRY_S = 10
LONGEST_S = 30 * 86400
"""Whoever waits longer is woken by a request before; clocks cannot count to all that may be written."""


class ModelPool:
    """Loaded models by name. Used only on the loop's thread, by requests that take turns on it.

    Models are loaded in threads of their own if there is a loop to wake, and requests for other models go on. Files of
    several models may be fetched at the same time; weights are read of one at a time.
    """

    def __init__(
        self,
        limit: int,
        device: str,
        on_status: Callable[[str, ModelStatus], None],
        dropped: Callable[[], None] = lambda: None,
        free_caches: Callable[[], int] = lambda: 0,
        describe: Callable[[load.Loaded], ModelInfo | None] = lambda model: None,
        *,
        known: Sharing | None = None,
        budget: Budget | None = None,
        idle_times: IdleTimes | None = None,
        turns: Turns | None = None,
        wake: Callable[[], None] | None = None,
        loaded_loras: int = 8,
    ) -> None:
        """Hold at most `limit` models, on `device` (a setting), within `budget` (None: what the device has); those that
        have components in common share what is `known`.

        `on_status` may be called in the thread that loads. `dropped` is called after a model was unloaded,
        `free_caches` drops the engine's caches and returns the bytes freed, for a model that does not fit, `describe`
        returns a model's capabilities. `wake` is called in the thread that loads, when there is something to do for
        `tend`; None: this thread loads.
        """
        self._limit = limit
        self._device = device
        self._on_status = on_status
        self._dropped = dropped
        self._free_caches = free_caches
        self._describe = describe
        self._known = known
        self._budget = budget or Budget()
        self._idle_times = idle_times or IdleTimes()
        self._turns = turns or Turns()
        self._wake = wake
        self._loaded_loras = loaded_loras
        self._loaded: OrderedDict[str, load.Loaded] = OrderedDict()
        self._blocks: dict[str, footprint.Blocks] = {}
        """Loaded model → its memory blocks."""
        self._newest: dict[str, ModelConfig] = {}
        """Loaded model → the config of its latest request."""
        self._users: Counter[str] = Counter()
        """Model → requests that use it, or have waited for its load and are about to."""
        self._pins: dict[str, bool] = {}
        """Model → whether it is pinned, if a request overrode its model file."""
        self._to_unload: set[str] = set()
        """Models to unload as soon as no request uses them."""
        self._loadings: dict[str, Loading] = {}
        """Model → the load that requests or orders wait for, oldest first."""
        self._reading: Loading | None = None
        """The load that was let go on: only one at a time reads weights. It may be cancelled."""
        self._short_of_room = False
        """Whether a load has to wait until models in use are idle."""
        self.loads = 0
        """Models loaded so far."""
        self.evictions = 0
        """Models unloaded so far to make room for another."""

    def __len__(self) -> int:
        return sum(not model.config.part for model in self._loaded.values())

    @property
    def loading(self) -> bool:
        """Whether a model is being loaded."""
        return bool(self._loadings or self._reading)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each loaded model; what two models share counts for both."""
        return {name: sum(blocks.values()) for name, blocks in self._blocks.items()}

    # What requests and orders call.

    @contextmanager
    def use(
        self, config: ModelConfig, turn: Callable[[], None], keep_alive: float | None = None
    ) -> Iterator[load.Loaded]:
        """The model for this `config`, loaded if necessary, and not unloaded while in use.

        `turn` lets other requests continue while this one waits. Requests for loaded models do not overtake a model
        that waits for room. `keep_alive`: of the request.
        """
        model = self._obtain(config, turn)
        self._idle_times.stay(config.name, keep_alive, config.keep_alive)
        try:
            yield model
        finally:
            self._release(config.name)

    def preload(self, config: ModelConfig, turn: Callable[[], None]) -> None:
        """Load the model, if it is not there, without using it."""
        self._obtain(config, turn, order=True)
        self._idle_times.stay_for_a_request(config.name, config.keep_alive)
        self._release(config.name)

    def unload(self, name: str | None) -> tuple[str, ...]:
        """Unload a model (None: all), pinned or not. Returns those in use: they leave when no request uses them."""
        in_use = []
        for loading in [each for each in self._loadings.values() if name in (None, each.config.name)]:
            if loading.requests:
                self._to_unload.add(loading.config.name)
                in_use.append(loading.config.name)
            else:
                loading.error = Cancelled(CANCELLED)  # for those who ordered it
                self._cancel(loading)
        for model in [name] if name is not None else list(self._loaded):
            if model in self._loaded and self._users[model]:
                self._to_unload.add(model)
                in_use.append(model)
            elif model in self._loaded:
                self._unload(model, UNLOAD_REQUESTED)
        return tuple(dict.fromkeys(in_use))

    def pin(self, name: str, pinned: bool) -> None:
        self._pins[name] = pinned

    # What the loop calls.

    def tend(self) -> None:
        """In every turn: go on with the load in progress, and unload what was idle for long enough."""
        for loading in dict.fromkeys([*self._loadings.values(), *([self._reading] if self._reading else [])]):
            if loading.done:
                if self._loadings.get(loading.config.name) is loading:
                    del self._loadings[loading.config.name]
                if self._reading is loading:
                    self._reading = None
                self._finish(loading)
        for waiting in self._waiting():
            if waiting.needs and not self._reading:
                self._try_to_admit(waiting, waiting.needs)
        for name in [name for name, seconds in self._idle().items() if seconds <= 0]:
            self._unload(name, f"it was idle for {self._idle_times.of(name):g} s (keep_alive)")

    def _waiting(self) -> list[Loading]:
        """Loads that wait for room: parts, as requests that are in the way of a model wait for them; then one model."""
        waiting = [each for each in self._loadings.values() if each.needs]
        parts = [each for each in waiting if each.config.part]
        return [*parts, *[each for each in waiting if not each.config.part][:1]]

    def until_expiry(self) -> float | None:
        """Seconds until an idle model is to be unloaded; None if none is."""
        soonest = min(self._idle().values(), default=math.inf)
        return None if soonest > LONGEST_S else max(0.0, soonest)

    def close(self) -> None:
        """End the loads in progress as soon as possible."""
        for loading in self._loadings.values():
            loading.cancel()

    # A model for a request.

    def _obtain(self, config: ModelConfig, turn: Callable[[], None], *, order: bool = False) -> load.Loaded:
        """The model, counted as used from now on. A failed load leaves nothing behind: the next request tries again."""
        name = config.name
        while True:
            self.tend()
            loaded, loading = self._loaded.get(name), self._loadings.get(name)
            if loaded and reload.serves(loaded, config):
                if config.part or not self._short_of_room:
                    self._to_unload.discard(name)  # it is requested again
                    self._users[name] += 1
                    return self._take(loaded, config)
            elif loading is None or reload.loading_config(loading.config) == reload.loading_config(config):
                return self._join(loading or self._begin(config, turn), config, turn, order=order)
            turn()

    def _begin(self, config: ModelConfig, turn: Callable[[], None]) -> Loading:
        self._on_status(config.name, ModelStatus("loading"))
        read = controlnets.load if config.part else load.load
        return Loading(
            config,
            lambda config, report, make_room: read(config, self._device, report, make_room, self._known),
            lambda status: self._on_status(config.name, status),
            turn,
        )

    def _join(self, loading: Loading, config: ModelConfig, turn: Callable[[], None], *, order: bool) -> load.Loaded:
        """Wait for the load. Raises its error. When the last one that waits leaves, the load is cancelled."""
        name = config.name
        loading.join(order)
        try:
            if not loading.begun:
                self._launch(loading)
            while self._loadings.get(name) is loading:
                self.tend()
                if self._loadings.get(name) is loading:
                    turn()
        except BaseException:
            loading.leave(order)
            if self._loadings.get(name) is not loading and not loading.error:
                self._release(name)  # it was loaded, and counted as used
            elif not loading.waiting and self._loadings.get(name) is loading:
                self._cancel(loading)
            raise
        if loading.error:
            raise copy.copy(loading.error)
        return self._take(self._loaded[name], config)

    def _take(self, loaded: load.Loaded, config: ModelConfig) -> load.Loaded:
        """The loaded model as this request sees it."""
        name = config.name
        self._loaded.move_to_end(name)
        changed, self._newest[name] = self._newest[name] != config, config
        if self._users[name] == 1:
            loaded.config = config
        # Running requests keep the model file they were made with.
        model = loaded if loaded.config == config else replace(loaded, config=config)
        if changed:  # a default of requests changed
            self._on_status(name, self._ready(model))
        return model

    def _release(self, name: str) -> None:
        self._users[name] -= 1
        if not self._users[name]:
            self._become_idle(name)
        if self._loaded[name].state.broken:
            self._forget_broken()
        if not self._users[name] and name in self._to_unload:
            self._unload(name, UNLOAD_REQUESTED)

    # Loads in progress.

    def _launch(self, loading: Loading) -> None:
        self._loadings[loading.config.name] = loading
        if self._wake:
            loading.start(self._turns, self._wake)
            return

        def wait_for_room() -> None:
            while loading.needs:
                self._try_to_admit(loading, loading.needs)
                if loading.needs:
                    loading.turn()

        loading.run_here(wait_for_room)

    def _try_to_admit(self, loading: Loading, needs: footprint.Needs) -> None:
        """Let the load go on if there is room for it, or can be: idle models are unloaded."""
        name, part = loading.config.name, loading.config.part
        self._short_of_room = self._short_of_room or not part
        if name in self._loaded:
            if self._users[name]:
                return  # it must be reloaded; requests that use the old one finish first
            self._forget_broken()
            self._unload(name, self._loaded[name].state.broken or "its model file changed")
        self._forget_broken()
        staying = [self._blocks[other] for other, model in self._loaded.items() if self._pinned(model)]
        staying.append(needs.shared)
        if refusal := self._budget.refusal(name, needs, staying):
            loading.refuse(ModelTooLarge(refusal))
        else:
            while (full := not part and len(self) >= self._limit) or not self._budget.fits(
                needs, [*self._blocks.values(), needs.shared]
            ):
                idle = self._oldest(models=full)
                if idle is None and part:  # a request that waits for it keeps its model from leaving
                    loading.refuse(TooManyRequests(NO_ROOM.format(name), retry_after=RETRY_S))
                    return
                if idle is None and any(self._users.values()):
                    return
                if idle is None:  # all are pinned, or the rest is offloaded
                    break
                self._evict(idle, "another model needs its place")
            self._reading = loading
            with cpu_threads.using(loading.threads):
                self._on_status(name, ModelStatus("loading"))
            loading.admit()
        self._short_of_room = self._short_of_room and part

    def _forget_broken(self) -> None:
        """What a request has left changed is not shared with the next model, and is reloaded in all that have it."""
        for broken in [model for model in self._loaded.values() if model.state.broken]:
            modules = footprint.modules_of(broken.pipeline)
            if self._known:
                self._known.forget(modules)
            ids = {id(module) for module in modules}
            for model in self._loaded.values():
                if any(id(module) in ids for module in footprint.modules_of(model.pipeline)):
                    model.state.broken = model.state.broken or broken.state.broken

    def _cancel(self, loading: Loading) -> None:
        """Nobody waits for it any more. Its thread ends at its next report; what it has read by then is dropped."""
        loading.cancel()
        del self._loadings[loading.config.name]
        self._to_unload.discard(loading.config.name)
        self._short_of_room = False
        self._on_status(loading.config.name, ModelStatus("unloaded", CANCELLED))

    def _finish(self, loading: Loading) -> None:
        """The load has ended: its model is loaded, or nothing of it is left."""
        error = loading.error
        if loading.cancelled:
            loading.model = None
            if error is not None:
                release_frames(error)
            self._free()
        elif error is None:
            self._enter(loading)
        elif is_out_of_memory(error):
            release_frames(error)
            self._try_with_more_memory(loading)
        else:
            self._fail(loading, error)

    def _enter(self, loading: Loading) -> None:
        name, model = loading.config.name, loading.model
        assert model is not None
        loading.model = None
        self.loads += not model.config.part
        self._loaded[name] = model
        self._blocks[name] = model.blocks()
        lora_room.connect(name, self._loaded_loras, self._budget, self._loaded, self._blocks, self._evict_idle)
        self._newest[name] = loading.config
        self._users[name] += loading.waiting  # they are about to use it
        with cpu_threads.using(loading.threads):
            self._on_status(name, self._ready(model))

    def _try_with_more_memory(self, loading: Loading) -> None:
        name = loading.config.name
        gc.collect()
        if not self._free_caches() and not self._evict_idle():
            message = (
                f"{name}: does not fit into memory. Write `offload: group`, `quantization`, a smaller "
                "dtype or `cuda: false` into its file"
            )
            self._fail(loading, LoadError(message))
            return
        offload.empty_cache()
        self._launch(loading)
        self.tend()

    def _fail(self, loading: Loading, error: BaseException) -> None:
        loading.error = error
        self._to_unload.discard(loading.config.name)
        release_frames(error)
        self._free()
        self._on_status(loading.config.name, ModelStatus("failed", getattr(error, "message", repr(error))))

    def describe_again(self, model: load.Loaded) -> None:
        """Report a loaded model's capabilities and memory: a request has changed them."""
        if model.config.name in self._blocks:
            self._blocks[model.config.name] = model.blocks()
        self._on_status(model.config.name, self._ready(model))

    def _ready(self, model: load.Loaded) -> ModelStatus:
        if model.config.part:
            return ModelStatus("ready")
        try:
            return ModelStatus("ready", info=self._describe(model))
        except Exception:  # an unusual pipeline may still be able to draw
            log.exception("%s: its capabilities could not be read", model.config.name)
            return ModelStatus("ready")

    # Leaving.

    def _evict_idle(self) -> bool:
        idle = self._oldest()
        if idle is not None:
            self._evict(idle, "its memory is needed")
        return idle is not None

    def _become_idle(self, name: str) -> None:
        """Called when the last request using the model has ended."""
        self._idle_times.begin(name)
        model = self._loaded[name]
        model.config = self._newest[name]
        try:
            offload.offload_all(model.pipeline)
        except Exception as error:  # whatever a module raises when it is moved
            log.exception("%s: its modules could not be put into main memory", name)
            model.state.broken = f"its modules could not be put into main memory: {error}"

    def _idle(self) -> dict[str, float]:
        """Models that are neither pinned nor in use → seconds until they are to be unloaded, least recent first."""
        return {
            name: self._idle_times.left(name)
            for name, model in self._loaded.items()
            if not self._pinned(model) and not self._users[name]
        }

    def _oldest(self, *, models: bool = False) -> str | None:
        """The least recently used model or part (`models`: model) that is neither pinned nor in use."""
        return next((name for name in self._idle() if not (models and self._loaded[name].config.part)), None)

    def _pinned(self, model: load.Loaded) -> bool:
        return self._pins.get(model.config.name, model.config.pinned)

    def _evict(self, name: str, reason: str) -> None:
        self.evictions += 1
        self._unload(name, reason)

    def _unload(self, name: str, reason: str) -> None:
        log.info("%s was unloaded: %s", name, reason)
        del self._loaded[name], self._newest[name], self._blocks[name]
        self._idle_times.forget(name)
        self._to_unload.discard(name)
        self._dropped()
        self._free()
        for model in self._loaded.values():  # there is more room now: models that did not fit may fit
            model.state.tiled_from = None
        self._on_status(name, ModelStatus("unloaded", reason))

    def _free(self) -> None:
        gc.collect()
        offload.empty_cache()
        allocator.trim()
