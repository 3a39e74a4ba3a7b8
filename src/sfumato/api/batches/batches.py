"""Carries out batches: a few lines at a time, each as a job is, so that they fill neither the queue nor the memory."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from sfumato import logs
from sfumato.api.batches.places import Places
from sfumato.api.batches.store import BatchStore, output_line
from sfumato.api.batches.tables import CANCELLING, Line, StoredBatch
from sfumato.api.jobs.jobs import AGAIN_S, BEAT_S, EXPIRE_S, Jobs, pause
from sfumato.api.jobs.run import Run
from sfumato.errors import JobsUnavailable

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

PAGE = 100
"""Positions of lines that are read at once."""

CANCELLED = 499
"""Status of a line that was ended."""


@dataclass(eq=False)
class _Active:
    """A batch that this process carries out."""

    batch: StoredBatch
    feeding: asyncio.Task[None] | None = None
    """Begins its lines."""
    ending: str = ""
    """The state that it is to end in before its lines have ended: expired, cancelled, or completed without room."""
    lines: set[asyncio.Task[None]] = field(default_factory=set)
    runs: set[Run] = field(default_factory=set)
    refused: set[Run] = field(default_factory=set)
    """Those that found the queue full. They hold no place while they wait for the next try, and no more lines begin."""
    admitted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while there are none of them."""

    def __post_init__(self) -> None:
        self.admitted.set()


class Batches:
    """The batches of one server. `places`: how many lines are drawn or wait in the queue at a time; it may change."""

    def __init__(
        self, jobs: Jobs, store: BatchStore, *, places: Callable[[], int], clock: Callable[[], float] = time.time
    ) -> None:
        self.store = store
        self.clock = clock
        self.reading = asyncio.Lock()
        """Held while an input is read: one at a time is in memory."""
        self._jobs = jobs
        self._count = places
        self._places = Places(places())
        self._active: dict[str, _Active] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._room: dict[str, int] = {}
        """Caller → bytes that it may still store."""
        self._news = asyncio.Event()
        self._stopped = False
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Carry out what was accepted and did not end, and whatever other servers leave behind."""
        self._stopped = False
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Leave what has not ended to the next start. Before `Jobs.stop`, which closes the database."""
        self._stopped = True
        tasks = [*self._tasks, *([self._keeper] if self._keeper else [])]
        for active in self._active.values():
            tasks += [*active.lines, *([active.feeding] if active.feeding else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def blocking(self, call: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """A call of a store, in a thread."""
        return await self._jobs.blocking(call, *args, **more)

    async def look(self) -> None:
        """Begin batches that nobody carries out, and end those that are cancelled or expire."""
        self._places.resize(self._count())
        mine, self._room = await self.blocking(self.store.claim)
        for batch in mine:
            active = self._active.get(batch.id)
            if active is None:
                active = self._begin(batch)
            if batch.state == CANCELLING:
                self._end(active, "cancelled")
            elif batch.expires <= self.clock():
                self._end(active, "expired")

    def look_now(self) -> None:
        """There is a new batch."""
        self._news.set()

    async def cancel(self, batch: StoredBatch) -> bool:
        """Let it end within one denoising step, without the lines that have not; False if it has ended already."""
        if not await self.blocking(self.store.cancel, batch.id, self.clock()):
            return False
        if active := self._active.get(batch.id):
            self._end(active, "cancelled")
        return True

    async def _keep(self) -> None:
        """Until it is cancelled."""
        since_expired = EXPIRE_S
        while True:
            self._news.clear()
            try:
                await self.look()
                if since_expired >= EXPIRE_S:
                    since_expired = 0.0
                    await self.blocking(self.store.expire, self.clock())
            except JobsUnavailable as error:
                log.warning("%s", error.message)
            except Exception as error:  # any error: without a next round no batch would begin or end
                log.error("batches: %s", logs.error_location(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._news.wait()
            since_expired += BEAT_S

    def _begin(self, batch: StoredBatch) -> _Active:
        active = self._active[batch.id] = _Active(batch)
        active.feeding = asyncio.create_task(self._feed(active))
        self._start(self._carry_out(active, active.feeding), functools.partial(self._over, active))
        return active

    def _start(
        self, work: Coroutine[Any, Any, None], over: Callable[[asyncio.Task[None]], object] = lambda task: None
    ) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(over)

    def _over(self, active: _Active, task: asyncio.Task[None]) -> None:
        del self._active[active.batch.id]
        if not task.cancelled() and (error := task.exception()):
            log.error("%s: %s", active.batch.id, logs.error_location(error))

    def _end(self, active: _Active, state: str) -> None:
        """Begin no more of its lines, and end those that are drawn."""
        if active.ending:
            return
        active.ending = state
        if active.feeding:
            active.feeding.cancel()
        for run in active.runs:
            self._start(self._jobs.cancel_run(run))

    async def _carry_out(self, active: _Active, feeding: asyncio.Task[None]) -> None:
        batch = active.batch
        await asyncio.wait({feeding})
        while active.lines:
            await asyncio.wait(active.lines)
        if self._stopped:
            return
        if not active.ending:
            feeding.result()  # raises what went wrong
            if await self._stored(self.store.pending, batch.id, -1, 1):
                return  # a line could not be carried out, and the log says why: the next look begins the batch again
        state = active.ending or "completed"
        if await self._stored(self.store.finish, batch, state, self.clock()):
            log.info("%s: %s", batch.id, state)

    async def _feed(self, active: _Active) -> None:
        """Begin its lines, in order, as there are places. Batches take turns."""
        after = -1
        while positions := await self._stored(self.store.pending, active.batch.id, after, PAGE):
            for position in positions:
                await active.admitted.wait()
                await self._places.take()
                run = Run(active.batch.job(position), promised=True)
                task = asyncio.create_task(self._draw(active, run, position))
                active.lines.add(task)
                task.add_done_callback(functools.partial(self._line_over, active, run))
            after = positions[-1]

    def _line_over(self, active: _Active, run: Run, task: asyncio.Task[None]) -> None:
        if run not in active.refused:
            self._places.give()
        self._admitted(active, run)
        active.lines.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("%s: %s", active.batch.id, logs.error_location(error))

    async def _draw(self, active: _Active, run: Run, position: int) -> None:
        """Carry out a line, and store its answer."""
        batch, custom_id = active.batch, ""

        async def body() -> bytes | None:
            nonlocal custom_id
            line: Line | None = await self._stored(self.store.line, batch.id, position)
            custom_id = line.custom_id if line else ""
            return line.body if line else None

        active.runs.add(run)
        try:
            if active.ending or not await self._jobs.draw(run, body, functools.partial(self._pause, active)):
                return
        finally:
            active.runs.discard(run)
            run.end()
        status = run.answer.status
        if active.ending and status == CANCELLED:
            return
        answer = output_line(run.job.id, custom_id, status=status, body=run.answer.body)
        await self._stored(self.store.end_line, batch.id, position, answer, status >= 300)
        log.info("%s: line %d, status %d", batch.id, position + 1, status)
        self._room[batch.caller] = self._room.get(batch.caller, len(answer)) - len(answer)
        if self._room[batch.caller] < 0:
            self._end(active, "completed")

    async def _pause(self, active: _Active, run: Run) -> None:
        """Of a line that found the queue full: others have its place meanwhile."""
        active.refused.add(run)
        active.admitted.clear()
        self._places.give()
        await pause(run)
        place, cancelled = asyncio.create_task(self._places.take()), asyncio.create_task(run.cancelled.wait())
        try:
            await asyncio.wait({place, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancelled.cancel()
            if not place.cancel():  # it has one
                self._admitted(active, run)

    def _admitted(self, active: _Active, run: Run) -> None:
        active.refused.discard(run)
        if not active.refused:
            active.admitted.set()

    async def _stored(self, call: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """A call of the store, until the database takes it."""
        while True:
            try:
                return await self.blocking(call, *args, **more)
            except JobsUnavailable as error:
                log.warning("%s", error.message)
                await asyncio.sleep(AGAIN_S)
