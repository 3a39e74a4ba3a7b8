"""The engine in a thread of this process: for the command line, and for tests of the layers below."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from sfumato.config import ModelConfig
from sfumato.core import Event, Generation
from sfumato.engine import environment
from sfumato.engine.protocol import (
    Cancel,
    DeviceState,
    Load,
    OnDevice,
    OnPlace,
    Order,
    Ordered,
    Report,
    Stop,
    Submit,
    Unload,
)
from sfumato.engine.streams import Streams
from sfumato.errors import WorkerDied
from sfumato.settings import Settings
from sfumato.status import EngineStats, ModelStatus

if TYPE_CHECKING:
    from sfumato.engine.loop import Loop

log = logging.getLogger(__name__)


class Local:
    """Engine whose loop runs in a thread; imports torch into this process when started."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.on_place: OnPlace = lambda id, taken: None
        self.on_device: OnDevice = lambda id, device: None
        self.on_places: Callable[[int], None] = lambda places: None
        self._streams = Streams(lambda id, taken: self.on_place(id, taken))
        self._loop: Loop | None = None
        self._thread: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def stats(self) -> EngineStats:
        return self._streams.stats

    @property
    def devices(self) -> Sequence[DeviceState]:
        streams = self._streams
        return [DeviceState(self._settings.device, self.ready, "", streams.open_count, self.stats, streams.statuses)]

    def order(self, command: Order) -> None:
        if self._loop:
            self._loop.post(command)

    async def carry_out(self, command: Load | Unload) -> Ordered:
        return await self._streams.carried_out(command, self.order) if self.ready else Ordered("")

    def status(self, model: str) -> ModelStatus:
        return self._streams.status(model)

    async def start(self) -> None:
        environment.prepare()
        from sfumato.engine.loop import Loop

        event_loop = asyncio.get_running_loop()

        def send(report: Report) -> None:
            event_loop.call_soon_threadsafe(self._streams.deliver, report)

        loop = self._loop = Loop(self._settings, send)

        def run() -> None:
            try:
                loop.run()
            except Exception:  # an error in the loop itself; a thread can only log it
                log.exception("the loop failed")
            finally:  # otherwise waiting requests would wait forever
                event_loop.call_soon_threadsafe(self._streams.fail_all, WorkerDied("the engine has stopped"))

        self._thread = threading.Thread(target=run, name="sfumato-loop", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        if self._loop and self._thread:
            self._loop.post(Stop())
            await asyncio.to_thread(self._thread.join)

    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        loop = self._loop
        assert loop is not None, "call start() before submit()"
        loop.post(Submit(config, generation))
        cancel = functools.partial(loop.post, Cancel(generation.id))
        async with aclosing(self._streams.events(generation.id, cancel)) as events:
            async for event in events:
                yield event
