"""The models in memory: who uses them, who has to leave, and for where: main memory, or altogether."""

from __future__ import annotations

import gc
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable
from dataclasses import replace

from sfumato import allocator
from sfumato.batching import offload
from sfumato.config import ModelConfig
from sfumato.models.footprint import Block, Blocks, Needs
from sfumato.models.load import Loaded
from sfumato.models.sharing import Sharing
from sfumato.residency.idle_times import IdleTimes
from sfumato.residency.main_memory import MainMemory
from sfumato.status import ModelInfo, ModelStatus

log = logging.getLogger(__name__)

UNLOAD_REQUESTED = "unloading was requested"
FILE_CHANGED = "its model file changed"


class Residents:
    """Models by name. Used only on the loop's thread."""

    def __init__(
        self,
        on_status: Callable[[str, ModelStatus], None],
        dropped: Callable[[], None],
        describe: Callable[[Loaded], ModelInfo | None],
        wanted: Container[str],
        known: Sharing | None,
        main_memory: MainMemory,
        idle_times: IdleTimes,
    ) -> None:
        """As of `ModelPool`. `wanted`: models that are being loaded, or on their way back from main memory."""
        self.on_status = on_status
        self._dropped = dropped
        self._describe = describe
        self._wanted = wanted
        self._known = known
        self.main_memory = main_memory
        self.idle_times = idle_times
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()
        """Models on their device, the least recently used first."""
        self.blocks: dict[str, Blocks] = {}
        """Loaded model → its memory blocks."""
        self._newest: dict[str, ModelConfig] = {}
        """Model in memory → the config of its latest request."""
        self.users: Counter[str] = Counter()
        """Model → requests that use it, or have waited for its load and are about to."""
        self.pins: dict[str, bool] = {}
        """Model → whether it is pinned, if a request overrode its model file."""
        self.to_unload: set[str] = set()
        """Models to unload as soon as no request uses them."""
        self._unsettled = False
        """Whether tensors of models that wait in main memory may still be on the device without being used there."""
        self.evictions = 0

    def __len__(self) -> int:
        return sum(not model.config.part for model in (*self.loaded.values(), *self.main_memory.models.values()))

    def models(self) -> list[str]:
        """Those on their device that are whole models, and no parts for requests."""
        return [name for name, model in self.loaded.items() if not model.config.part]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each model in memory; what two models share counts for both."""
        return {name: sum(blocks.values()) for name, blocks in self.blocks.items()} | self.main_memory.sizes

    # Coming and being used.

    def enter(self, config: ModelConfig, model: Loaded, users: int) -> None:
        """It is on its device now; so many requests are about to use it."""
        name = config.name
        self.main_memory.remove(name)
        self.loaded[name] = model
        self.blocks[name] = model.blocks()
        self._newest[name] = config
        self.users[name] += users
        self.on_status(name, self._ready(model))

    def take(self, config: ModelConfig) -> Loaded:
        """The loaded model as a request that is counted as its user sees it."""
        name = config.name
        loaded = self.loaded[name]
        self.loaded.move_to_end(name)
        changed, self._newest[name] = self._newest[name] != config, config
        if self.users[name] == 1:
            loaded.config = config
        # Running requests keep the model file they were made with.
        model = loaded if loaded.config == config else replace(loaded, config=config)
        if changed:  # a default of requests changed
            self.on_status(name, self._ready(model))
        return model

    def release(self, name: str) -> None:
        """One request does not use it any more."""
        self.users[name] -= 1
        if not self.users[name]:
            self._become_idle(name)
        if self.loaded[name].state.broken:
            self.forget_broken()
        if not self.users[name] and name in self.to_unload:
            self.unload(name, UNLOAD_REQUESTED)

    def _become_idle(self, name: str) -> None:
        self.idle_times.begin(name)
        model = self.loaded[name]
        model.config = self._newest[name]
        try:
            offload.offload_all(model.pipeline)
        except Exception as error:  # whatever a module raises when it is moved
            log.exception("%s: its modules could not be put into main memory", name)
            model.state.broken = f"its modules could not be put into main memory: {error}"

    def forget_broken(self) -> None:
        """What a request has left changed is not shared with the next model, and is reloaded in all that have it."""
        models = [*self.loaded.values(), *self.main_memory.models.values()]
        for broken in [model for model in models if model.state.broken]:
            modules = broken.modules().values()
            if self._known:
                self._known.forget(modules)
            ids = {id(module) for module in modules}
            for model in models:
                if any(id(module) in ids for module in model.modules().values()):
                    model.state.broken = model.state.broken or broken.state.broken

    def describe_again(self, model: Loaded) -> None:
        """Report a loaded model's capabilities and memory: a request has changed them."""
        if model.config.name in self.blocks:
            self.blocks[model.config.name] = model.blocks()
        self.on_status(model.config.name, self._ready(model))

    def _ready(self, model: Loaded) -> ModelStatus:
        if model.config.part:
            return ModelStatus("ready")
        try:
            return ModelStatus("ready", info=self._describe(model))
        except Exception:  # an unusual pipeline may still be able to draw
            log.exception("%s: its capabilities could not be read", model.config.name)
            return ModelStatus("ready")

    def waits(self, model: Loaded, reason: str) -> None:
        """Report that it waits in main memory."""
        status = replace(self._ready(model), state="in_main_memory", detail=reason)
        self.on_status(model.config.name, status)

    # Leaving.

    def pinned(self, model: Loaded) -> bool:
        return self.pins.get(model.config.name, model.config.pinned)

    def idle(self) -> list[str]:
        """Models on a device that are neither pinned nor in use, least recently used first."""
        return [name for name, model in self.loaded.items() if not self.pinned(model) and not self.users[name]]

    def waiting(self) -> list[str]:
        """Models in main memory that are neither pinned nor wanted, those that came first first."""
        models = self.main_memory.models.items()
        return [name for name, model in models if name not in self._wanted and not self.pinned(model)]

    def stays(self) -> dict[str, float]:
        """Idle models, wherever they are → seconds until they are to be unloaded."""
        return {name: self.idle_times.left(name) for name in (*self.idle(), *self.waiting())}

    def unload_expired(self) -> None:
        """Unload what was idle for long enough, and what could not be moved."""
        for name in [name for name, seconds in self.stays().items() if seconds <= 0]:
            self.unload(name, f"it was idle for {self.idle_times.of(name):g} s (keep_alive)")
        for name, model in list(self.main_memory.models.items()):
            if model.state.broken and name not in self._wanted:
                self.unload(name, model.state.broken)

    def evict_idle(self) -> bool:
        """Let one idle model leave its device; whether there was one."""
        idle = self.idle()
        if idle:
            self.evict(idle[0], "its memory is needed")
        return bool(idle)

    def leave_one(self) -> bool:
        """Let one idle model leave its device, or if there is none main memory; whether there was one."""
        if self.evict_idle():
            return True
        waiting = self.waiting()
        if waiting:
            self.unload(waiting[0], "its memory is needed")
        return bool(waiting)

    def evict(self, name: str, reason: str, shared: Iterable[Block] = ()) -> None:
        """Let an idle model leave its device, for main memory if it has room; blocks that are `shared` stay."""
        self.evictions += 1
        model, staying = self.loaded[name], self._staying(shared, without=name)
        size = sum(bytes for block, bytes in model.blocks().items() if block not in staying)
        if not self.main_memory.may_hold(model, size) or not self.make_room_in_main_memory(size, self.main_memory.room):
            self.unload(name, reason)
            return
        log.info("%s waits in main memory: %s", name, reason)
        self._unsettled = True
        self.main_memory.add(name, model, size)
        del self.loaded[name], self.blocks[name]
        self._dropped()
        self.waits(model, reason)

    def make_room_in_main_memory(self, size: int, room: Callable[[], int]) -> bool:
        """Unload models that wait there until there is `room` for `size` bytes; whether there is."""
        while room() < size:
            if not (waiting := self.waiting()):
                return False
            self.unload(waiting[0], "its main memory is needed")
        return True

    def unload(self, name: str, reason: str) -> None:
        """Let a model leave, from wherever it is."""
        log.info("%s was unloaded: %s", name, reason)
        self._unsettled = True  # a model in main memory may have had components in common with it
        for of_model in (self.loaded, self.blocks, self._newest):
            of_model.pop(name, None)
        self.main_memory.remove(name)
        self.idle_times.forget(name)
        self.to_unload.discard(name)
        self._dropped()
        self.free()
        for model in self.loaded.values():  # there is more room now: models that did not fit may fit
            model.state.tiled_from = None
        self.on_status(name, ModelStatus("unloaded", reason))

    def free(self) -> None:
        """Return what nothing refers to any more to the system."""
        gc.collect()
        offload.empty_cache()
        allocator.trim()

    # Moving.

    def moves(self, needs: Needs) -> Callable[[], None]:
        """What has to move between the device and main memory before a load goes on; call it in any thread."""
        leaving, self._unsettled = self.main_memory.to_take(self._staying(needs.shared)), False

        def move() -> None:
            self.main_memory.take(leaving)
            self.main_memory.give(needs.shared, needs.device)
            offload.empty_cache()

        return move

    def unsettle(self) -> None:
        """A load has ended in some way: what it brought to the device may have to leave it."""
        self._unsettled = True

    def settle(self) -> None:
        """Move what no model on the device uses any more to main memory, now that no load does it."""
        if self._unsettled and self.main_memory.models:
            self.moves(Needs({}))()
            self.free()
        self._unsettled = False

    def _staying(self, more: Iterable[Block], without: str = "") -> set[Block]:
        """Blocks that stay on the device: those of the models there, and `more`."""
        models = [model for name, model in self.loaded.items() if name != without]
        return {block for model in models for block in model.blocks()} | set(more)
