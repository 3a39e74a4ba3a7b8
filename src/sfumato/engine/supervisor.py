"""The engine in a child process: started by handshake, watched, restarted with back-off.

When the worker dies, what it had not answered is sent to the next one: the same seeds, so the same
pictures. What it was drawing is suspect, and drawn again one at a time with nothing beside it; the one
at which a worker dies again is taken for the reason and failed, and no neighbour with it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from sfumato.config import ModelConfig
from sfumato.core import Done, EngineStats, Event, Failed, Generation, ModelStatus
from sfumato.engine import wire
from sfumato.engine.protocol import Answer, Cancel, Command, Ready, Started, Stop, Submit
from sfumato.engine.streams import Streams
from sfumato.errors import WorkerDied
from sfumato.settings import Settings

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Importing torch takes seconds, on a cold disk tens of them."""
STOP_TIMEOUT_S = 30.0
MAX_BACKOFF_S = 30.0
STARTS = 3
"""After so many starts in a row that came to nothing, those who wait are told."""
DEATHS = 2
"""A generation that was being drawn at so many deaths of the worker is failed; the second time it was alone."""


@dataclass(slots=True)
class Flight:
    """A generation that is not answered yet."""

    submit: Submit
    sent: bool = False
    """Whether the present worker has it."""
    started: bool = False
    """Whether the present worker has begun with it."""
    deaths: int = 0


class Supervisor:
    """Engine whose worker is a process of its own: whatever happens to it, this one lives on."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._streams = Streams()
        self._flights: dict[str, Flight] = {}
        self._heard = 0.0
        self._restarts = 0
        self._up = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def ready(self) -> bool:
        return self._up.is_set()

    @property
    def pid(self) -> int | None:
        """Process id of the worker that is up."""
        return self._process.pid if self._process and self.ready else None

    @property
    def stats(self) -> EngineStats:
        return replace(self._streams.stats, restarts=self._restarts)

    def status(self, model: str) -> ModelStatus:
        return self._streams.status(model)

    async def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        self._stopping = True
        if self._writer:
            self._post(Stop())
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()  # type: ignore[union-attr]
            except TimeoutError:
                log.warning("the worker did not end within %.0f s; it is killed", STOP_TIMEOUT_S)
        if self._process:
            _kill(self._process)
        if self._keeper:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        self._fail_all("the server stops")

    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        id = generation.id
        self._flights[id] = Flight(Submit(config, generation))
        self._send()
        try:
            async with aclosing(self._streams.events(id, functools.partial(self._post, Cancel(id)))) as events:
                async for event in events:
                    yield event
        finally:
            self._ended(id)

    def _send(self) -> None:
        """Hand the worker what it may have now: a suspect alone, or without suspects everything."""
        if self._writer is None:
            return
        flights = list(self._flights.values())
        if not any(flight.sent for flight in flights):
            self._heard = asyncio.get_running_loop().time()  # it was idle, and had nothing to say
        for flight in [flight for flight in flights if flight.deaths][:1] or flights:
            if not flight.sent:
                flight.sent = True
                self._post(flight.submit)

    def _ended(self, id: str) -> None:
        if self._flights.pop(id, None):
            self._send()

    def _post(self, command: Command) -> None:
        if self._writer and not self._writer.is_closing():
            self._writer.write(wire.pack(command))

    async def _keep(self) -> None:
        failures = 0
        while not self._stopping:
            try:
                await self._live()
                failures = 0
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                failures += 1
                if failures >= STARTS:
                    self._fail_all(f"the worker does not start ({error!r}); see the server's log")
            if self._stopping:
                break
            delay = min(MAX_BACKOFF_S, 0.25 * 2**failures)
            log.error("the worker is gone; starting another in %.2f s", delay)
            await asyncio.sleep(delay)
            self._restarts += 1

    async def _live(self) -> None:
        """One worker from its start to its end. Raises when it never came up."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "sfumato.engine.worker",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            writer.write(wire.pack(self._settings))
            async with asyncio.timeout(START_TIMEOUT_S):
                hello: Ready = await wire.receive_async(reader)
            log.info("worker %d is up: %s, %s", self._process.pid, hello.device, dict(hello.versions))
            self._writer = writer
            self._send()
            self._up.set()
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch(self._process))
                await self._listen(reader)
                watch.cancel()
        finally:
            self._up.clear()
            self._writer = None
            writer.close()
            _kill(self._process)
            await self._process.wait()
            self._streams.forget()
            self._count_deaths()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Deliver what the worker reports, until it is gone."""
        while True:
            try:
                report = await wire.receive_async(reader)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            self._heard = asyncio.get_running_loop().time()
            self._streams.deliver(report)
            match report:
                case Started(id) if id in self._flights:
                    self._flights[id].started = True
                case Answer(id, Done() | Failed()):
                    self._ended(id)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill a worker that owes an answer and has not been heard of for `hang_s`."""
        limit = self._settings.hang_s
        while True:
            await asyncio.sleep(limit / 4)
            # Not only what has started: whoever hung it may have gone away, and the others wait for their turn.
            busy = any(flight.sent for flight in self._flights.values())
            if busy and asyncio.get_running_loop().time() - self._heard > limit:
                log.error("worker %d has not been heard of for %d s; it is killed", process.pid, limit)
                _kill(process)
                return

    def _fail_all(self, why: str) -> None:
        for id in self._flights:
            self._streams.fail(id, WorkerDied(why))
        self._flights.clear()

    def _count_deaths(self) -> None:
        for id, flight in list(self._flights.items()):
            flight.deaths += flight.started
            flight.sent = flight.started = False
            if flight.deaths >= DEATHS:
                del self._flights[id]
                self._streams.fail(
                    id,
                    WorkerDied(
                        f"the process that computes died {flight.deaths} times while it drew this; "
                        "it is not tried again"
                    ),
                )


def _kill(process: asyncio.subprocess.Process) -> None:
    # Not `process.kill()`: that reaps a process that is dead already, and asyncio then misses its exit code.
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
