"""The engine on several devices: a worker process for each, and a router that chooses between them.

A worker's death concerns its own pictures only. Those that it was drawing are drawn again by its next worker: the one
that it may have died of is not to meet others. Those that waited there go to another device, and so do pictures whose
model is too large for a device.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence, Set
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace
from typing import Final

from sfumato.config import ModelConfig
from sfumato.core import BATCH, Event, Failed, Generation, Step
from sfumato.engine.protocol import DeviceState, Load, OnDevice, OnPlace, Order, Ordered, Unload
from sfumato.engine.totals import total
from sfumato.errors import AdditionTooLarge, DeviceUnavailable, ModelTooLarge, NoWorker, SfumatoError, WorkerDied
from sfumato.process.routing import SQUARE, START_S, Router
from sfumato.process.supervisor import WORKER, Supervisor
from sfumato.settings import Settings
from sfumato.status import EngineStats, LoadState, ModelInfo, ModelStatus

UNKNOWN_STEPS = 30
"""Assumed for a picture whose request, model file and loaded model do not say."""

NEAREST: Final[Sequence[LoadState]] = ("ready", "loading", "downloading", "in_main_memory", "failed", "unloaded")
"""States of a model on a device, the one from which it draws soonest first."""
THERE = NEAREST[:4]


class Devices:
    """Engine with one worker process for each device."""

    def __init__(self, settings: Settings, names: Sequence[str], worker: Sequence[str] = WORKER) -> None:
        """`names`: as torch has them. `worker`: as `Supervisor` has it."""
        self.on_place: OnPlace = lambda id, taken: None
        self.on_device: OnDevice = lambda id, device: None
        self.on_places: Callable[[int], None] = lambda places: None
        self._places_each = settings.max_active
        self._router = Router(len(names), settings.loaded_models)
        self._labels = labels(names)
        self._workers = [
            Supervisor(_for_one(settings, name, len(names)), worker, label)
            for name, label in zip(names, self._labels, strict=True)
        ]
        self._unfit: dict[str, tuple[ModelConfig, set[int]]] = {}
        """Model → its file, and the devices that it cannot be loaded on."""
        self._loads: set[asyncio.Task[Ordered]] = set()
        """Loads that nobody waits for."""
        self._routed: set[str] = set()
        """Models that the router knows."""
        for number, each in enumerate(self._workers):
            each.on_place = lambda id, taken: self.on_place(id, taken)
            each.on_status = functools.partial(self._on_status, number)
            each.on_change = functools.partial(self._on_change, number)
            each.elsewhere = functools.partial(self._elsewhere, number)
            self._router.delay(number, START_S)

    # The life of the workers.

    @contextmanager
    def launched(self) -> Iterator[None]:
        """As `Supervisor.launched`, for all workers at once."""
        with ExitStack() as stack:
            for worker in self._workers:
                stack.enter_context(worker.launched())
            yield

    async def start(self) -> None:
        for worker in self._workers:
            await worker.start()

    async def stop(self) -> None:
        for task in self._loads:
            task.cancel()
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    # Pictures.

    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        id, deaths = generation.id, 0
        refused: set[int] = set()
        steps, pixels = work_of(config, generation, self.status(config.name).info)
        low = generation.priority == BATCH
        while True:
            number = self._choose(config, steps, pixels, low, refused)
            self.on_device(id, self._labels[number])
            self._router.begin(id, number, config.name, steps, time.monotonic(), pixels=pixels, low=low)
            moves = False
            try:
                async with aclosing(self._workers[number].submit(config, generation, deaths)) as events:
                    async for event in events:
                        match event:
                            case Step(step, total_steps):
                                self._router.step(id, total_steps - step, time.monotonic())
                            case Failed(error) if moves := self._moves(error, config, number, refused):
                                deaths = error.deaths if isinstance(error, NoWorker) else deaths
                                break
                        yield event
            finally:
                self._router.end(id)
                self._has_ended(number, config.name)
            if not moves:
                return

    def _choose(
        self,
        config: ModelConfig,
        steps: int,
        pixels: int = SQUARE,
        low: bool = False,
        refused: Set[int] = frozenset(),
    ) -> int:
        """`refused`: devices that have refused this request."""
        self._routed.add(config.name)
        refused = refused | self._unfit_for(config)
        number = self._router.choose(config.name, steps, time.monotonic(), pixels=pixels, low=low, refused=refused)
        fit = [each for each in range(len(self._workers)) if each not in refused]
        return number if number in fit or not fit else fit[0]  # none of these can draw: it waits there

    def _moves(self, error: SfumatoError, config: ModelConfig, number: int, refused: set[int]) -> bool:
        """Whether what failed so on this device goes to another one. `refused`: gets this one, if it has refused it."""
        if isinstance(error, ModelTooLarge | DeviceUnavailable):
            refused.add(number)
            if not isinstance(error, AdditionTooLarge):
                self._unfit[config.name] = config, self._unfit_for(config) | {number}
        elif not isinstance(error, NoWorker):
            return False
        unfit = refused | self._unfit_for(config)
        if len(unfit) == len(self._workers):
            self._unfit.pop(config.name, None)  # the next request tries again: there may be room by then
            return False
        return any(not worker.problem for at, worker in enumerate(self._workers) if at not in unfit)

    def _elsewhere(self, number: int, config: ModelConfig) -> bool:
        """Whether a device other than this one can draw pictures of the model now."""
        others = {*range(len(self._workers))} - {number} - self._unfit_for(config)
        return any(self._workers[other].ready for other in others)

    def _unfit_for(self, config: ModelConfig) -> set[int]:
        """Devices that cannot have this model. A file that was changed is tried anew."""
        known, numbers = self._unfit.get(config.name, (config, set[int]()))
        return numbers if known == config else set()

    # Models.

    def order(self, command: Order) -> None:
        if isinstance(command, Load):
            task = asyncio.create_task(self.carry_out(command))  # nobody waits for it; it may need another device
            self._loads.add(task)
            task.add_done_callback(self._loads.discard)
        else:
            self._unfit.clear()  # what is pinned may have been in the way
            for worker in self._workers:
                worker.order(command)

    async def carry_out(self, command: Load | Unload) -> Ordered:
        if isinstance(command, Unload):
            self._unfit.clear()
            done = await asyncio.gather(*(worker.carry_out(command) for worker in self._workers))
            in_use = tuple(dict.fromkeys(name for each in done for name in each.in_use))
            return Ordered("", in_use, next((each.error for each in done if each.error), None))
        refused: set[int] = set()
        while True:
            number = self._for_load(command.config, refused)
            ordered = await self._workers[number].carry_out(command)
            if not ordered.error or not (
                self._moves(ordered.error, command.config, number, refused)
                or self._starts_elsewhere(ordered.error, number, refused)
            ):
                return ordered

    def _starts_elsewhere(self, error: SfumatoError, number: int, refused: set[int]) -> bool:
        """Whether a model goes to another device because the worker of this one does not start."""
        if not isinstance(error, WorkerDied) or not self._workers[number].problem:
            return False
        refused.add(number)
        return any(not worker.problem for at, worker in enumerate(self._workers) if at not in refused)

    def _for_load(self, config: ModelConfig, refused: Set[int] = frozenset()) -> int:
        """The device that has the model, or is about to; else the one that a picture would be sent to."""
        states = [worker.status(config.name).state for worker in self._workers]
        there = [number for number, state in enumerate(states) if state in THERE and number not in refused]
        if there:
            return min(there, key=lambda number: NEAREST.index(states[number]))
        number = self._choose(config, 0, refused=refused)
        self._router.loading(number, config.name, time.monotonic())  # the next model goes to another device
        return number

    def status(self, model: str) -> ModelStatus:
        return min((worker.status(model) for worker in self._workers), key=lambda status: NEAREST.index(status.state))

    def _on_status(self, number: int, model: str, status: ModelStatus) -> None:
        if model not in self._routed:  # a part of one
            return
        match status.state:
            case "ready":
                self._router.loaded(number, model, time.monotonic())
            case "loading" | "downloading":
                self._router.loading(number, model, time.monotonic())
            case _:
                self._router.unloaded(number, model)

    def _has_ended(self, number: int, model: str) -> None:
        """A picture has; perhaps before its worker began to load what the router takes for being loaded since then."""
        status = self._workers[number].status(model)
        if status.state not in ("loading", "downloading"):
            self._on_status(number, model, status)

    # Devices.

    def _on_change(self, number: int) -> None:
        worker = self._workers[number]
        if not worker.ready:
            self._router.emptied(number)
            self._unfit = {name: (config, unfit - {number}) for name, (config, unfit) in self._unfit.items()}
        self._router.delay(number, 0 if worker.ready else float("inf") if worker.problem else START_S)
        self.on_places(self._places_each * max(1, sum(not each.problem for each in self._workers)))

    @property
    def ready(self) -> bool:
        return any(worker.ready for worker in self._workers)

    @property
    def devices(self) -> Sequence[DeviceState]:
        return [state for worker in self._workers for state in worker.devices]

    @property
    def stats(self) -> EngineStats:
        return total(worker.stats for worker in self._workers)


def labels(names: Sequence[str]) -> list[str]:
    """What each device is called: its name, with a number where several workers share one (`cpu:0`, `cpu:1`)."""
    counts, numbers = Counter(names), Counter[str]()
    found = []
    for name in names:
        found.append(f"{name}:{numbers[name]}" if counts[name] > 1 else name)
        numbers[name] += 1
    return found


def work_of(config: ModelConfig, generation: Generation, info: ModelInfo | None) -> tuple[int, int]:
    """Steps and pixels of a picture: of the request, else of the model file, else of the loaded model."""
    known = [generation.sampling, config.sampling, *([info.sampling] if info else [])]
    steps = next((each.steps for each in known if each.steps), UNKNOWN_STEPS)
    width, height = next((each.size for each in known if each.size), (SQUARE, 1))
    return steps, width * height


def _for_one(settings: Settings, name: str, devices: int) -> Settings:
    """The settings of one of so many workers; main memory is the machine's, and shared."""
    share = max(1, settings.main_memory_mb // devices) if settings.main_memory_mb > 0 else settings.main_memory_mb
    return replace(settings, device=name, main_memory_mb=share)
