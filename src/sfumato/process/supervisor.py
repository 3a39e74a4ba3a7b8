"""The engine in a child process: started with a handshake, watched, restarted with back-off.

When the worker dies, its unanswered generations are sent to the next one: the same seeds, so the same
pictures. Those in flight are suspects and are drawn again alone, one at a time; the one during which
a worker dies again is taken as the cause and failed, and no other with it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import reprlib
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from sfumato import logs
from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Failed, Generation
from sfumato.engine.protocol import (
    Answer,
    Cancel,
    Command,
    DeviceState,
    Load,
    OnDevice,
    OnPlace,
    Order,
    Ordered,
    Pin,
    Ready,
    Report,
    Started,
    Status,
    Stop,
    Submit,
    Unload,
    Unusable,
)
from sfumato.engine.streams import Streams
from sfumato.errors import Cancelled, DeviceUnavailable, NoWorker, RequestTooLarge, SfumatoError, WorkerDied
from sfumato.process import wire
from sfumato.settings import Settings
from sfumato.status import EngineStats, ModelStatus

log = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "sfumato.process.worker")

START_TIMEOUT_S = 120.0
"""Importing torch takes seconds, on a cold disk tens of seconds."""
STOP_TIMEOUT_S = 30.0
IDLE_STOP_TIMEOUT_S = 5.0
"""For a worker without requests: it may be loading a model, which cannot be interrupted."""
MAX_BACKOFF_S = 30.0
UNUSABLE_S = 60.0
"""Seconds between two starts on a device that cannot be used. An operator may have freed it meanwhile."""
STARTS = 3
"""Failed starts in a row after which waiting requests are failed."""
SETTLED_S = 30.0
"""A start counts as successful once the worker was up for this long."""
MAX_ORDERS = 100
WATCH_S = 0.5
"""Seconds between two looks at whether the worker hangs."""
DEATHS = 2
"""A generation in flight at this many worker deaths is failed; the second time it was alone."""


@dataclass(slots=True)
class Flight:
    """A generation that has not been answered yet."""

    submit: Submit
    sent: bool = False
    """Whether it was sent to the current worker."""
    started: bool = False
    """Whether the current worker has started it."""
    deaths: int = 0


class Launched(NamedTuple):
    """A started worker, and our end of its socket."""

    sock: socket.socket
    process: subprocess.Popen[bytes]


class Supervisor:
    """Engine whose worker is a separate process: this process survives whatever happens to it."""

    def __init__(self, settings: Settings, worker: Sequence[str] = WORKER, name: str = "") -> None:
        """`worker` is the command to run; the file descriptor of its socket end is appended. `name`: of the device."""
        self._settings = settings
        self._command = tuple(worker)
        self._name = name
        self.on_place: OnPlace = lambda id, taken: None
        self.on_device: OnDevice = lambda id, device: None
        self.on_places: Callable[[int], None] = lambda places: None
        self.on_status: Callable[[str, ModelStatus], None] = lambda model, status: None
        self.on_change: Callable[[], None] = lambda: None
        """Called when `ready` or `problem` has changed."""
        self.elsewhere: Callable[[ModelConfig], bool] = lambda config: False
        """Whether other workers can draw pictures of this model. Those that wait here for the next worker are then
        failed with a `NoWorker`, unless they may be the cause of the last one's death."""
        self.problem = ""
        """Why the worker does not start; empty if it is up, or starting."""
        self._streams = Streams(lambda id, taken: self.on_place(id, taken))
        self._flights: dict[str, Flight] = {}
        self._pins: dict[str, Pin] = {}
        """Pins that every new worker is told."""
        self._orders: deque[Order] = deque()
        """Orders that arrived while no worker was up."""
        self._last_message_at = 0.0
        self._restarts = 0
        self._up = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._launched: Launched | None = None
        """The first worker, if it was started before the event loop."""
        self._supervision: asyncio.Task[None] | None = None
        self._succeeded = False
        """Whether the current worker has started a generation, or was up for `SETTLED_S`."""
        self._stopping = False

    @property
    def ready(self) -> bool:
        return self._up.is_set()

    @property
    def devices(self) -> Sequence[DeviceState]:
        name = self._name or self._settings.device
        return [DeviceState(name, self.ready, self.problem, len(self._flights), self.stats, self._streams.statuses)]

    @property
    def pid(self) -> int | None:
        """Process id of the current worker."""
        return self._process.pid if self._process and self.ready else None

    @property
    def stats(self) -> EngineStats:
        return replace(self._streams.stats, restarts=self._restarts)

    def status(self, model: str) -> ModelStatus:
        return self._streams.status(model)

    def order(self, command: Order) -> None:
        if isinstance(command, Pin):
            self._pins[command.model] = command
        if self._writer:
            self._post(command)
        elif not isinstance(command, Pin):
            if len(self._orders) == MAX_ORDERS:
                self._drop(self._orders[0])
            self._orders.append(command)

    def _drop(self, order: Order) -> None:
        """Not carry it out; whoever waits for it is told."""
        self._orders.remove(order)
        if isinstance(order, Load):
            error = Cancelled(f"{order.config.name}: it was ordered to leave before it was loaded")
            self._streams.deliver(Ordered(order.id, error=error))

    async def carry_out(self, command: Load | Unload) -> Ordered:
        if isinstance(command, Unload) and not self._writer:  # nothing is loaded, and now nothing will be
            for order in [order for order in self._orders if _undoes(command, order)]:
                self._drop(order)
            return Ordered("")
        return await self._streams.carried_out(command, self.order)

    @contextmanager
    def launched(self) -> Iterator[None]:
        """Start the first worker before the event loop; it is ended on exit if `start` was never called."""
        with suppress(OSError):  # `start` will hit the same error and report it
            self._launched = self._spawn()
        try:
            yield
        finally:
            if self._launched:
                self._launched.sock.close()
                self._launched.process.kill()
                self._launched.process.wait()

    async def start(self) -> None:
        self._supervision = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        self._stopping = True
        if self._writer and self._process:
            self._post(Stop())
            limit = STOP_TIMEOUT_S if self._flights else IDLE_STOP_TIMEOUT_S
            try:
                async with asyncio.timeout(limit):
                    await self._reap(self._process)
            except TimeoutError:
                log.warning("the worker did not stop within %.0f s; killing it", limit)
        if self._process:
            self._process.kill()
        if self._supervision:
            self._supervision.cancel()
            await asyncio.wait([self._supervision])
        self._fail_all(WorkerDied("the server is stopping"))

    async def submit(self, config: ModelConfig, generation: Generation, deaths: int = 0) -> AsyncGenerator[Event, None]:
        """`deaths`: of other workers, that it may have caused."""
        id = generation.id
        self._flights[id] = Flight(Submit(config, generation), deaths=deaths)
        self._streams.open(id)
        self._send()
        try:
            async with aclosing(self._streams.events(id, functools.partial(self._post, Cancel(id)))) as events:
                async for event in events:
                    yield event
        finally:
            self._remove(id)

    def _send(self) -> None:
        """Send the worker what it may have now: everything, or while there are suspects one of them, alone."""
        if self._writer is None:
            return
        flights = list(self._flights.values())
        if not any(flight.sent for flight in flights):
            self._last_message_at = asyncio.get_running_loop().time()  # an idle worker sends nothing
        suspects = [flight for flight in flights if flight.deaths]
        if suspects and any(flight.sent for flight in flights if flight is not suspects[0]):
            return  # one that comes from another device waits until those are drawn that are here
        for flight in suspects[:1] or flights:
            if not flight.sent:
                flight.sent = True
                self._submit(flight.submit)

    def _submit(self, submit: Submit) -> None:
        try:
            self._post(submit)
        except wire.BadFrame as error:
            self._streams.fail(
                submit.generation.id, RequestTooLarge(f"the request cannot be sent to the worker: {error}")
            )

    def _remove(self, id: str) -> None:
        if self._flights.pop(id, None):
            self._send()

    def _post(self, command: Command) -> None:
        if self._writer and not self._writer.is_closing():
            self._writer.write(wire.pack(command))

    async def _supervise(self) -> None:
        """Run one worker after another until `stop`, whatever a worker does."""
        failures = 0
        while not self._stopping:
            self._succeeded = False
            reason, pause = await self._one_worker()
            if self._stopping:
                break
            failures = 0 if self._succeeded else failures + 1
            self._after_end(reason, failures)
            delay = max(pause, min(MAX_BACKOFF_S, 0.25 * 2**failures))
            log.error("the worker%s ended: %s; starting another in %.2f s", self._of_device, reason, delay)
            self._restarts += 1
            await asyncio.sleep(delay)

    async def _one_worker(self) -> tuple[str, float]:
        """Why a worker ended, and for how many seconds the next is not to be started."""
        try:
            return await self._run_worker(), 0.0
        except DeviceUnavailable as error:
            return error.message, UNUSABLE_S
        except Exception as error:  # any error: without a next worker nothing would be drawn again
            log.error("%s", logs.error_location(error))
            return f"it failed to start ({type(error).__name__}: {error})", 0.0

    @property
    def _of_device(self) -> str:
        return f" of {self._name}" if self._name else ""

    def _after_end(self, reason: str, failures: int) -> None:
        """What waits for the next worker is drawn elsewhere, or fails once `failures` starts in a row were in vain."""
        self.problem = reason if failures else ""
        self.on_change()
        message = f"the worker{self._of_device} does not start: {reason}; see the server's log"
        for id, flight in list(self._flights.items()):
            moves = (failures or not flight.deaths) and self.elsewhere(flight.submit.config)
            if failures >= STARTS or moves:
                self._fail(id, NoWorker(message, deaths=flight.deaths))

    async def _run_worker(self) -> str:
        """One worker from its start to its end; returns why it ended. Raises if it failed to start."""
        launched, self._launched = self._launched or self._spawn(), None
        self._process = process = launched.process
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_connection(sock=launched.sock)
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    hello = await wire.receive_async(reader)
            except TimeoutError:
                raise TimeoutError(f"no handshake within {START_TIMEOUT_S:.0f} s") from None
            if isinstance(hello, Unusable):
                raise DeviceUnavailable(hello.reason)
            if not isinstance(hello, Ready):
                raise wire.BadFrame(f"{reprlib.repr(hello)} is not a handshake")
            log.info("worker %d is up: %s, %s", process.pid, self._name or hello.device, dict(hello.versions))
            self._writer = writer
            for order in [*self._pins.values(), *self._orders]:
                self._post(order)
            self._orders.clear()
            self._send()
            self._up.set()
            self.problem = ""
            self.on_change()
            return await self._first_of(self._listen(reader), self._watch(), self._settle())
        finally:
            self._up.clear()
            self._writer = None
            (writer or launched.sock).close()
            process.kill()
            await self._reap(process)
            self._streams.forget()
            self._count_deaths()

    def _spawn(self) -> Launched:
        """Start a worker and send it its settings; it begins to import. Raises OSError."""
        parent_end, child_end = socket.socketpair()
        with child_end:
            try:
                process = subprocess.Popen([*self._command, str(child_end.fileno())], pass_fds=[child_end.fileno()])
                parent_end.sendall(wire.pack(self._settings))
            except BaseException:
                parent_end.close()
                raise
        return Launched(parent_end, process)

    async def _reap(self, process: subprocess.Popen[bytes]) -> None:
        await asyncio.to_thread(process.wait)

    async def _first_of(self, *endings: Coroutine[None, None, str]) -> str:
        """The result or error of whichever finishes first; the others are cancelled."""
        tasks = [asyncio.create_task(ending) for ending in endings]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _listen(self, reader: asyncio.StreamReader) -> str:
        """Deliver the worker's reports until it is gone or sends something invalid."""
        while True:
            try:
                report = await wire.receive_async(reader)
                self._last_message_at = asyncio.get_running_loop().time()
                self._handle(report)
            except (asyncio.IncompleteReadError, ConnectionError):
                return "it closed its connection"
            except Exception as error:  # from the frame, or from handling its content
                log.error("%s", logs.error_location(error))
                return f"it sent an invalid message: {error}"

    def _handle(self, report: Report) -> None:
        self._streams.deliver(report)
        match report:
            case Status(model, status):
                self.on_status(model, status)
            case Started(id) if id in self._flights:
                self._flights[id].started = self._succeeded = True
            case Answer(id, Done() | Failed()):
                self._succeeded = True
                self._remove(id)

    async def _settle(self) -> str:
        await asyncio.sleep(SETTLED_S)
        self._succeeded = True
        return await asyncio.Future()

    async def _watch(self) -> str:
        """Returns when the worker owes an answer and has sent nothing for `hang_s`."""
        while True:
            await asyncio.sleep(WATCH_S)
            limit = self._settings.hang_s
            # Not only started ones: the request that hung it may be gone, and the others wait for their turn.
            busy = any(flight.sent for flight in self._flights.values())
            if busy and asyncio.get_running_loop().time() - self._last_message_at > limit:
                return f"it sent nothing for {limit} s and was killed"

    def _fail_all(self, error: SfumatoError) -> None:
        for id in list(self._flights):
            self._fail(id, error)

    def _fail(self, id: str, error: SfumatoError) -> None:
        del self._flights[id]
        self._streams.fail(id, error)

    def _count_deaths(self) -> None:
        # The worker's last messages are lost if we wrote to it after its death. If none is known to have started,
        # each that was sent may be the cause.
        known = any(flight.started for flight in self._flights.values())
        for id, flight in list(self._flights.items()):
            flight.deaths += flight.started if known else flight.sent
            waits = flight.sent
            flight.sent = flight.started = False
            if flight.deaths >= DEATHS:
                told = f"the worker process died {flight.deaths} times while drawing this; it is not tried again"
                self._fail(id, WorkerDied(told))
            elif waits:
                self.on_place(id, False)  # until the next worker starts it: nothing draws it now


def _undoes(unload: Unload, order: Order) -> bool:
    return isinstance(order, Load) and unload.model in (None, order.config.name)
