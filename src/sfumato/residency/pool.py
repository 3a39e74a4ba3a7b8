"""A loaded model for each request: loads on demand, within a limit and a budget; a changed model file is reloaded."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from sfumato.batching import cpu_threads, offload
from sfumato.batching.batcher import is_out_of_memory
from sfumato.checkpoints.remote_limits import ANY, Limits
from sfumato.config import ModelConfig
from sfumato.errors import AdditionTooLarge, Cancelled, LoadError, ModelTooLarge, TooManyRequests
from sfumato.models import controlnets, estimators, ip_adapters, load
from sfumato.models.fetch import OnStatus
from sfumato.models.footprint import Needs
from sfumato.models.release import release_frames
from sfumato.models.sharing import Sharing
from sfumato.residency import lora_room, reload
from sfumato.residency.budget import Budget
from sfumato.residency.idle_times import IdleTimes
from sfumato.residency.loading import CANCELLED, Load, Loading
from sfumato.residency.main_memory import MainMemory
from sfumato.residency.residents import FILE_CHANGED, UNLOAD_REQUESTED, Residents
from sfumato.residency.turns import Turns
from sfumato.status import ModelInfo, ModelStatus

READERS: Mapping[str, Callable[..., load.Loaded]] = MappingProxyType({
    "": lambda *given: load.load(*given),
    "controlnet": lambda *given: controlnets.load(*given),
    "ip_adapter": lambda *given: ip_adapters.load(*given),
    "image_encoder": lambda *given: ip_adapters.load_encoder(*given),
    **dict.fromkeys(estimators.KINDS, lambda *given: estimators.load(*given)),
})  # fmt: skip
"""What loads a model, and each kind of `ModelConfig.part`."""

NO_ROOM = "{} does not fit beside the models in use; try again when fewer requests are drawn"
RETRY_S = 10
LOW_PATIENCE_S = 120.0
"""How long a load for which only requests of low priority wait lets others go first."""
LONGEST_S = 30 * 86400
"""Whoever waits longer is woken by a request before; clocks cannot count to all that may be written."""


class NoRoom(TooManyRequests):
    """There is no room for a part beside the models in use now. It never leaves this module."""

    def __init__(self, name: str, needs: Needs) -> None:
        super().__init__(NO_ROOM.format(name), retry_after=RETRY_S)
        self.needs = needs


class ModelPool:
    """Loaded models by name. Used only on the loop's thread, by requests that take turns on it.

    Models are loaded in threads of their own, and requests for other models go on. Files of several models may be
    fetched at the same time; weights are read of one at a time. Idle models that leave a device for another one wait in
    main memory, if there is room.
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
        wake: Callable[[], None],
        known: Sharing | None = None,
        budget: Budget | None = None,
        main_memory: MainMemory | None = None,
        idle_times: IdleTimes | None = None,
        turns: Turns | None = None,
        loaded_loras: int = 8,
        part_limits: Limits = ANY,
        turn: Callable[[], None] | None = None,
    ) -> None:
        """Hold at most `limit` models on `device` (a setting), within `budget` (None: what the device has); those that
        have components in common share what is `known`.

        `on_status` may be called in the thread that loads. `dropped` is called after a model has left its device,
        `free_caches` drops the engine's caches and returns the bytes freed, for a model that does not fit, `describe`
        returns a model's capabilities. `wake` is called in the thread that loads, when there is something to do for
        `tend`. `part_limits`: of what is downloaded of parts that requests name. `turn` lets other requests continue
        while one waits for its LoRAs; None: there are no others.
        """
        self._limit = limit
        self._device = device
        self._on_status = on_status
        self._free_caches = free_caches
        self._known = known
        self._budget = budget or Budget()
        self._idle_times = idle_times or IdleTimes()
        self._turns = turns or Turns()
        self._wake = wake
        self._loaded_loras = loaded_loras
        self._part_limits = part_limits
        self._turn = turn
        self._loadings: dict[str, Loading] = {}
        """Model → the load that requests or orders wait for, oldest first."""
        self._reading: Loading | None = None
        """The load that was let go on: only one at a time reads weights. It may be cancelled."""
        self._short_of_room = False
        """Whether a load has to wait until models in use are idle."""
        self._residents = Residents(
            on_status, dropped, describe, self._loadings, known, main_memory or MainMemory(), self._idle_times
        )
        self._loaded, self._users = self._residents.loaded, self._residents.users
        self.loads = 0
        """Models read from disk so far."""

    def __len__(self) -> int:
        return len(self._residents)

    @property
    def evictions(self) -> int:
        """Models that have left their device so far to make room for another."""
        return self._residents.evictions

    @property
    def loading(self) -> bool:
        """Whether a model is being loaded."""
        return bool(self._loadings or self._reading)

    @property
    def models(self) -> Mapping[str, load.Loaded]:
        """Those on their device that are whole models, by name."""
        return {name: self._loaded[name] for name in self._residents.models()}

    @property
    def reading_loras(self) -> bool:
        """Whether requests wait for LoRAs that are being read."""
        return any(model.state.adapters.reading for model in self._loaded.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each model in memory; what two models share counts for both."""
        return self._residents.sizes

    # What requests and orders call.

    @contextmanager
    def use(
        self,
        config: ModelConfig,
        turn: Callable[[], None],
        keep_alive: float | None = None,
        beside: Sequence[str] = (),
        *,
        low: bool = False,
    ) -> Iterator[load.Loaded]:
        """The model for this `config`, loaded if necessary, and not unloaded while in use.

        `turn` lets other requests continue while this one waits. Requests for loaded models do not overtake a model
        that waits for room. `keep_alive`: of the request. `beside`: what the request uses already.
        `low`: requests of others for loaded models overtake it for a while. Raises TooManyRequests for a part that has
        no room now, and AdditionTooLarge if it never has, beside those.
        """
        try:
            model = self._obtain(config, turn, low=low)
        except NoRoom as error:
            staying = [self._residents.blocks[name] for name in beside if name in self._residents.blocks]
            if refusal := self._budget.refusal_beside(config.name, error.needs, staying):
                raise AdditionTooLarge(refusal) from None
            raise TooManyRequests(error.message, retry_after=RETRY_S) from None
        self._idle_times.stay(config.name, keep_alive, config.keep_alive)
        try:
            yield model
        finally:
            self._residents.release(config.name)

    def preload(self, config: ModelConfig, turn: Callable[[], None]) -> None:
        """Load the model, if it is not there, without using it."""
        self._obtain(config, turn, order=True)
        self._idle_times.stay_for_a_request(config.name, config.keep_alive)
        self._residents.release(config.name)

    def unload(self, name: str | None) -> tuple[str, ...]:
        """Unload a model (None: all), pinned or not. Returns those in use: they leave when no request uses them."""
        residents = self._residents
        in_use = []
        for loading in [each for each in self._loadings.values() if name in (None, each.config.name)]:
            if loading.requests:
                residents.to_unload.add(loading.config.name)
                in_use.append(loading.config.name)
            else:
                loading.error = Cancelled(CANCELLED)  # for those who ordered it
                self._cancel(loading)
        there = (*self._loaded, *(model for model in residents.main_memory.models if model not in in_use))
        for model in [model for model in there if name in (None, model)]:
            if self._users[model]:
                residents.to_unload.add(model)
                in_use.append(model)
            else:
                residents.unload(model, UNLOAD_REQUESTED)
        self._settle()
        return tuple(dict.fromkeys(in_use))

    def pin(self, name: str, pinned: bool) -> None:
        self._residents.pins[name] = pinned

    def describe_again(self, model: load.Loaded) -> None:
        """Report a loaded model's capabilities and memory: a request has changed them."""
        self._residents.describe_again(model)

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
        self._residents.unload_expired()
        self._settle()

    def _waiting(self) -> list[Loading]:
        """Loads that wait for room: parts, as requests that are in the way of a model wait for them; then one model."""
        waiting = [each for each in self._loadings.values() if each.needs]
        parts = [each for each in waiting if each.config.part]
        models = sorted((each for each in waiting if not each.config.part), key=self._yields)
        return [*parts, *models[:1]]

    def _yields(self, loading: Loading) -> bool:
        """Whether it lets others go first: only requests of low priority wait for it, and not for long."""
        return loading.low == loading.waiting and self._idle_times.now() - loading.began < LOW_PATIENCE_S

    def _settle(self) -> None:
        if not self.loading:  # a load that goes on settles it, in its thread
            self._residents.settle()

    def until_expiry(self) -> float | None:
        """Seconds until an idle model is to be unloaded; None if none is."""
        soonest = min(self._residents.stays().values(), default=math.inf)
        return None if soonest > LONGEST_S else max(0.0, soonest)

    def close(self) -> None:
        """End the loads in progress as soon as possible."""
        for loading in self._loadings.values():
            loading.cancel()

    # A model for a request.

    def _obtain(
        self, config: ModelConfig, turn: Callable[[], None], *, order: bool = False, low: bool = False
    ) -> load.Loaded:
        """The model, counted as used from now on. A failed load leaves nothing behind: the next request tries again."""
        name, residents = config.name, self._residents
        while True:
            self.tend()
            loaded, loading = self._loaded.get(name), self._loadings.get(name)
            if loaded:
                reload.notice(loaded)
            if loaded and reload.serves(loaded, config):
                if config.part or not self._short_of_room:
                    residents.to_unload.discard(name)  # it is requested again
                    self._users[name] += 1
                    return residents.take(config)
            elif loading is None or reload.loading_config(loading.config) == reload.loading_config(config):
                return self._join(loading or self._begin(config), config, turn, order=order, low=low)
            turn()

    def _begin(self, config: ModelConfig) -> Loading:
        waiting = self._residents.main_memory.models.get(config.name)
        if waiting:
            reload.notice(waiting)
        if waiting and not reload.serves(waiting, config):
            self._residents.unload(config.name, waiting.state.broken or FILE_CHANGED)
            waiting = None
        self._on_status(config.name, ModelStatus("loading"))
        read = self._from_main_memory(waiting) if waiting else self._from_disk
        return Loading(
            config, read, lambda status: self._on_status(config.name, status), waiting, self._idle_times.now()
        )

    def _join(
        self, loading: Loading, config: ModelConfig, turn: Callable[[], None], *, order: bool, low: bool
    ) -> load.Loaded:
        """Wait for the load. Raises its error. When the last one that waits leaves, the load is cancelled."""
        name = config.name
        loading.join(order, low)
        try:
            if not loading.begun:
                self._launch(loading)
            while self._loadings.get(name) is loading:
                self.tend()
                if self._loadings.get(name) is loading:
                    turn()
        except BaseException:
            loading.leave(order, low)
            if self._loadings.get(name) is not loading and not loading.error:
                self._residents.release(name)  # it was loaded, and counted as used
            elif not loading.waiting and self._loadings.get(name) is loading:
                self._cancel(loading)
            raise
        if loading.error:
            raise copy.copy(loading.error)
        return self._residents.take(config)

    # In the thread that loads.

    def _from_disk(self, config: ModelConfig, report: OnStatus, make_room: load.MakeRoom) -> load.Loaded:
        given = (self._part_limits,) if config.part and not config.part_of_file else ()
        model = READERS[config.part](config, self._device, report, make_room, self._known, *given)
        if model.state.offload == "none":  # what it shares with a model in main memory comes to the device
            self._residents.main_memory.give(model.blocks(), model.device, model)
        return model

    def _from_main_memory(self, model: load.Loaded) -> Load:
        def bring(config: ModelConfig, report: OnStatus, make_room: load.MakeRoom) -> load.Loaded:
            report(ModelStatus("loading", "from main memory"))
            make_room(Needs({}, model.device, model.dtype))  # what it takes is seen when it is admitted
            self._residents.main_memory.give(model.blocks(), model.device, model)
            return model

        return bring

    # Loads in progress.

    def _launch(self, loading: Loading) -> None:
        self._loadings[loading.config.name] = loading
        loading.start(self._turns, self._wake)

    def _try_to_admit(self, loading: Loading, needs: Needs) -> None:
        """Let the load go on if there is room for it, or can be: idle models leave."""
        name, part, residents = loading.config.name, loading.config.part, self._residents
        if loading.waiting_model:
            needs = residents.main_memory.needs(loading.waiting_model)
        self._short_of_room = self._short_of_room or not (part or self._yields(loading))
        if name in self._loaded:
            if self._users[name]:
                return  # it must be reloaded; requests that use the old one finish first
            residents.forget_broken()
            residents.unload(name, self._loaded[name].state.broken or FILE_CHANGED)
        residents.forget_broken()
        shared = needs.shared_there
        staying = [residents.blocks[other] for other, model in self._loaded.items() if residents.pinned(model)]
        if refusal := self._budget.refusal(name, needs, [*staying, shared]):
            loading.refuse((AdditionTooLarge if part else ModelTooLarge)(refusal))
        else:
            while (full := not part and len(residents.models()) >= self._limit) or not self._budget.fits(
                needs, [*residents.blocks.values(), shared]
            ):
                idle = [each for each in residents.idle() if not full or each in residents.models()]
                if not idle and part:  # a request that waits for it keeps its model from leaving
                    loading.refuse(NoRoom(name, needs))
                    return
                if not idle and any(self._users.values()):
                    return
                if not idle:  # all are pinned, or the rest is offloaded
                    break
                residents.evict(idle[0], "another model needs its place", needs.shared)
            if not loading.waiting_model:  # it is read into main memory first
                residents.make_room_in_main_memory(needs.total, residents.main_memory.free)
            self._reading = loading
            with cpu_threads.using(loading.threads):
                self._on_status(name, ModelStatus("loading"))
            loading.admit(residents.moves(needs))
        self._short_of_room = self._short_of_room and bool(part)

    def _cancel(self, loading: Loading) -> None:
        """Nobody waits for it any more. Its thread ends at its next report; what it has read by then is dropped."""
        loading.cancel()
        del self._loadings[loading.config.name]
        self._residents.to_unload.discard(loading.config.name)
        self._residents.unsettle()
        self._short_of_room = False
        if loading.waiting_model:
            self._residents.waits(loading.waiting_model, CANCELLED)
        else:
            self._on_status(loading.config.name, ModelStatus("unloaded", CANCELLED))

    def _finish(self, loading: Loading) -> None:
        """The load has ended: its model is loaded, or nothing of it is left."""
        error = loading.error
        if loading.cancelled:
            loading.model = None
            if error is not None:
                release_frames(error)
            self._residents.unsettle()
            self._residents.free()
        elif error is None:
            self._enter(loading)
        elif is_out_of_memory(error):
            release_frames(error)
            self._try_with_more_memory(loading)
        else:
            self._fail(loading, error)

    def _enter(self, loading: Loading) -> None:
        model, loading.model = loading.model, None
        assert model is not None
        self.loads += not (loading.waiting_model or loading.config.part)
        loading.waiting_model = None
        with cpu_threads.using(loading.threads):
            self._residents.enter(loading.config, model, loading.waiting)
        lora_room.connect(
            loading.config.name, self._loaded_loras, self._budget, self._loaded, self._residents.blocks,
            self._evict_now, self._turns, self._turn, self._wake,
        )  # fmt: skip

    def _evict_now(self) -> bool:
        """Let one idle model leave its device, for a request that needs its memory; whether there was one."""
        evicted = self._residents.evict_idle()
        self._settle()
        return evicted

    def _try_with_more_memory(self, loading: Loading) -> None:
        name = loading.config.name
        gc.collect()
        if not self._free_caches() and not self._residents.leave_one():
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
        name = loading.config.name
        loading.error, loading.waiting_model = error, None
        self._residents.to_unload.discard(name)
        self._residents.main_memory.remove(name)
        release_frames(error)
        self._residents.free()
        self._on_status(name, ModelStatus("failed", getattr(error, "message", repr(error))))
