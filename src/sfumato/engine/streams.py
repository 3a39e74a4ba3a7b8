"""The API side of running requests: each has a queue of events up to its terminal one."""

from __future__ import annotations

import asyncio
import reprlib
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from typing import Any

from sfumato.core import Done, Event, Failed, Preview, Step
from sfumato.engine.protocol import (
    Answer,
    Load,
    OnPlace,
    Order,
    Ordered,
    Placed,
    Ready,
    Report,
    Started,
    StatsReport,
    Status,
    Unload,
)
from sfumato.engine.totals import total
from sfumato.errors import SfumatoError, WorkerDied
from sfumato.status import EngineStats, ModelStatus

OF_ONE_WORKER: Mapping[str, Any] = {
    "prompt_cache_bytes": 0,
    "resident_models": 0,
    "model_bytes": {},
    "memory_bytes": 0,
    "device_memory_bytes": 0,
}
"""Fields of `EngineStats` that end with the worker: what it holds. All others count on."""


class Streams:
    """Routes a worker's reports to the waiting requests."""

    def __init__(self, on_place: OnPlace = lambda id, taken: None) -> None:
        self._on_place = on_place
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        self.statuses: dict[str, ModelStatus] = {}
        """Of every model that the worker has reported."""
        self._orders: dict[str, asyncio.Future[Ordered]] = {}
        self._stats = EngineStats()
        self._before = EngineStats()

    @property
    def open_count(self) -> int:
        """Requests that have not ended."""
        return len(self._queues)

    def open(self, id: str) -> asyncio.Queue[Event]:
        """Queue the events of this request, from now on, until they are read."""
        return self._queues.setdefault(id, asyncio.Queue())

    async def events(self, id: str, cancel: Callable[[], None]) -> AsyncGenerator[Event, None]:
        """Events of one request; calls `cancel` if closed before the terminal event."""
        queue = self.open(id)
        ended = False
        try:
            while not ended:
                event = await queue.get()
                ended = isinstance(event, Done | Failed)
                yield event
        finally:
            del self._queues[id]
            if not ended:
                cancel()

    async def carried_out(self, command: Load | Unload, send: Callable[[Order], None]) -> Ordered:
        """`send` the command, and wait until the worker reports that it was carried out, or is gone."""
        id = uuid.uuid4().hex
        done: asyncio.Future[Ordered] = asyncio.get_running_loop().create_future()
        self._orders[id] = done
        try:
            send(replace(command, id=id))
            return await done
        finally:
            del self._orders[id]

    def deliver(self, report: Report) -> None:
        """Handle a report. Raises TypeError, and changes nothing, if it is not one."""
        match report:
            case Answer(str(id), Step() | Preview() | Done() | Failed(SfumatoError()) as event):
                if queue := self._queues.get(id):
                    queue.put_nowait(event)
            case Status(str(model), ModelStatus() as status):
                self.statuses[model] = status
            case Ordered(str(id)):
                if (done := self._orders.get(id)) and not done.done():
                    done.set_result(report)
            case StatsReport(EngineStats() as stats):
                self._stats = stats
            case Placed(str(id), bool(taken)):
                self._on_place(id, taken)
            case Started(str(id)):
                self._on_place(id, True)
            case Ready():
                pass
            case _:
                raise TypeError(f"{reprlib.repr(report)} is not a report")

    def fail(self, id: str, error: SfumatoError) -> None:
        """End one stream."""
        if queue := self._queues.get(id):
            queue.put_nowait(Failed(error))

    def fail_all(self, error: SfumatoError) -> None:
        """End every stream."""
        for id in self._queues:
            self.fail(id, error)
        self._end_orders(error)

    def _end_orders(self, error: SfumatoError) -> None:
        for id in self._orders:
            self.deliver(Ordered(id, error=error))

    def forget(self) -> None:
        """The worker is gone, and with it every loaded model."""
        self._end_orders(WorkerDied("the worker ended before the order was carried out; send it again"))
        self.statuses.clear()
        self._before, self._stats = ended(self.stats), EngineStats()

    @property
    def stats(self) -> EngineStats:
        """Sum over all workers; memory and models are those of the current one."""
        return total([self._before, self._stats])

    def status(self, model: str) -> ModelStatus:
        return self.statuses.get(model, ModelStatus())


def ended(stats: EngineStats) -> EngineStats:
    """What counts on of a worker that is gone."""
    return replace(stats, **OF_ONE_WORKER)
