"""Devices in simulated time: the server's own queue, routing and policy on measured step times, and two simpler ways.

`Served` decides with the code that serves: `serving.queue.Queue` says whose turn it is, `process.routing.Router` which
device draws, `batching.policy.choose` (with `FairShare` and `ForwardTimes`) which calls share the next forward pass.
What is simulated is time alone. Not simulated: the parts of a long decode with others in between, memory that runs
out, the prompt cache.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field

from benchmarks.arrivals import Wanted
from benchmarks.step_times import StepTimes
from sfumato.batching.fair_share import FairShare
from sfumato.batching.forward_times import ForwardTimes
from sfumato.batching.policy import Waiting, choose
from sfumato.process.routing import Router
from sfumato.serving.queue import Queue, Ticket

LOADED_MODELS = 2


@dataclass(slots=True)
class Totals:
    """What came of a trace. Times in seconds."""

    latencies: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    """Whether of low priority → from each picture's arrival to its answer."""
    met: int = 0
    """Interactive pictures that met their deadlines."""
    busy: float = 0.0
    """Time in which devices computed, of all devices together."""
    passes: int = 0
    calls: int = 0
    """Calls of the denoiser in these forward passes of it."""
    until: float = 0.0
    """When the last one was answered."""

    def answered(self, wanted: Wanted, at: float, slack: float, times: StepTimes) -> None:
        took = at - wanted.at
        self.latencies[wanted.low].append(took)
        self.met += not wanted.low and took <= slack * times.alone(wanted.side, wanted.steps)
        self.until = max(self.until, at)


def _at_first(loaded: Sequence[str], device: int) -> Sequence[str]:
    """Models of this device at the beginning."""
    return [loaded[(device + n) % len(loaded)] for n in range(min(LOADED_MODELS, len(loaded)))]


class Events:
    """What happens in order of time: arrivals, and calls that were planned."""

    def __init__(self, arrivals: Iterable[Wanted]) -> None:
        self.now = 0.0
        self._arrivals = iter(arrivals)
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._planned, (self.now + seconds, self._count, call))

    def run(self, arrive: Callable[[Wanted], None]) -> None:
        planned = self._planned
        coming = next(self._arrivals, None)
        while planned or coming is not None:
            if coming is not None and (not planned or coming.at <= planned[0][0]):
                self.now = coming.at
                arrive(coming)
                coming = next(self._arrivals, None)
            else:
                self.now, _, call = heapq.heappop(planned)
                call()


# The server.


class _Turn(asyncio.Event):
    """Of a ticket: what happens when its turn has come."""

    def __init__(self, begin: Callable[[], None]) -> None:
        super().__init__()
        self._begin = begin

    def set(self) -> None:
        super().set()
        self._begin()


@dataclass(slots=True, eq=False)
class _Kind:
    """Calls that may share a forward pass. There is one object for each kind, which is its key."""

    name: str
    """As `StepTimes` has it."""
    rows: int = 1
    denoises: bool = False
    compared: bool = True
    """As in the batcher: the times of a VAE are not."""
    repeated: Set[_Kind] = frozenset()


@functools.cache
def _encode(model: str) -> _Kind:
    return _Kind("encode")


@functools.cache
def _kinds(model: str, side: int, steps: int, rows: int) -> Sequence[_Kind]:
    """The calls of a picture, from the first to the last."""
    if steps != 1:
        encode, denoise, decode = _kinds(model, side, 1, rows)
        return encode, *[denoise] * steps, decode
    denoise = _Kind(f"denoise {side}", rows, denoises=True)
    denoise.repeated = frozenset((denoise,))
    return _encode(model), denoise, _Kind(f"decode {side}", compared=False)


@dataclass(slots=True)
class _Picture:
    number: int
    id: str
    wanted: Wanted
    ticket: Ticket
    kinds: Iterator[_Kind]
    """Its calls after the present one."""
    left: int
    device: int = 0


class _Device:
    """One worker: its parked calls, and what it computes next."""

    def __init__(self, times: StepTimes, max_rows: int, dice: random.Random) -> None:
        self._times, self._max_rows, self._dice = times, max_rows, dice
        self.parked: dict[int, Waiting] = {}
        self.beginning = 0
        """Pictures that begin before the next forward pass."""
        self.busy = False
        self.models: dict[str, float] = {}
        """Those in memory, and since when they are used."""
        self.using: defaultdict[str, int] = defaultdict(int)
        self._share = FairShare()
        self._active: dict[int, tuple[str, bool]] = {}
        """Number of a picture → its caller and class."""
        self._known = ForwardTimes()
        self._turn = self._low_led = 0

    def park(self, picture: _Picture, kind: _Kind) -> None:
        wanted = picture.wanted
        self.parked[picture.number] = Waiting(
            picture.number,
            kind,
            kind.rows,
            self._turn,
            wanted.caller,
            picture.left,
            kind.repeated,
            wanted.steps,
            wanted.low,
        )

    def enter(self, picture: _Picture) -> None:
        wanted = picture.wanted
        beside = (payer for payer in self._active.values() if payer[1] is wanted.low)
        self._share.enter((wanted.caller, wanted.low), beside)
        self._active[picture.number] = wanted.caller, wanted.low

    def leave(self, picture: _Picture) -> None:
        del self._active[picture.number]
        if not self._active:
            self._share.clear()

    def next_pass(self, now: float) -> tuple[_Kind, list[Waiting], float]:
        """Kind, calls and seconds of the next forward pass, which begins at this time."""
        calls = self.parked
        group = choose(
            [*calls.values()], self._turn, self._room, self._received, bearable=self._bearable, rides=self._rides,
            low_led=self._low_led,
        )  # fmt: skip
        rows = 0
        for call in group:
            del calls[call.id]
            rows += call.rows
            self._share.add((call.caller, call.low), call.rows)
        if group[0].low:
            self._low_led = self._turn
        self._turn += 1
        kind = group[0].key
        assert isinstance(kind, _Kind)
        seconds = self._times.one(kind.name, rows, self._dice, now)
        if kind.compared:
            self._known.note(kind, rows, seconds, on_host=self._times.on_host)
        return kind, group, seconds

    def _received(self, call: Waiting) -> float:
        return self._share.of((call.caller, call.low))

    def _room(self, call: Waiting) -> int:
        return self._known.limit(call.key, self._max_rows)

    def _rides(self, leader: Waiting, rows: int, most: int) -> int:
        return self._known.rides(leader.key, rows, most)

    def _bearable(self, leader: Waiting, most: int) -> int:
        rows = self._known.bearable(leader.key, leader.rows, most)
        self._known.lose(leader.key, rows, most)
        return rows


class Served:
    """The trace on `devices` devices, with the queue, the routing and the policy of the server."""

    def __init__(
        self,
        times: StepTimes,
        devices: int,
        *,
        slack: float,
        max_rows: int = 8,
        max_active: int = 16,
        seed: int = 0,
        on_answer: Callable[[Wanted, float], None] = lambda wanted, took: None,
    ) -> None:
        """`slack`: times as long as a picture takes alone are its deadline. `seed`: of chance in the times of passes.

        `on_answer`: told how long each took.
        """
        self._on_answer = on_answer
        self._times, self._slack = times, slack
        self._devices = [_Device(times, max_rows, random.Random(seed * devices + at)) for at in range(devices)]
        self._router = Router(devices, LOADED_MODELS)
        self._queue = Queue(max_active * devices, 10**9, clock=lambda: self._events.now)
        self._events = Events(())
        self._pictures: dict[int, _Picture] = {}
        self._loading: defaultdict[tuple[int, str], list[_Picture]] = defaultdict(list)
        self.totals = Totals()

    def run(self, arrivals: Iterable[Wanted], loaded: Sequence[str] = ()) -> Totals:
        """`loaded`: models that are in memory at the beginning, on all devices in turns."""
        for at, device in enumerate(self._devices):
            for model in _at_first(loaded, at):
                device.models[model] = 0.0
                self._router.loaded(at, model, 0.0)
        self._events = Events(arrivals)
        self._events.run(self._arrive)
        return self.totals

    def _arrive(self, wanted: Wanted) -> None:
        (ticket,) = self._queue.join(wanted.caller, 1, model=wanted.model, low=wanted.low)
        number = ticket.number
        calls = _kinds(wanted.model, wanted.side, wanted.steps, self._times.rows)
        picture = _Picture(number, str(number), wanted, ticket, iter(calls), wanted.steps)
        if ticket.called.is_set():
            self._begin(picture)
        else:
            ticket.called = _Turn(lambda: self._begin(picture))

    def _begin(self, picture: _Picture) -> None:
        now, wanted = self._events.now, picture.wanted
        pixels, low = wanted.side**2, wanted.low
        at = picture.device = self._router.choose(wanted.model, wanted.steps, now, pixels=pixels, low=low)
        self._router.begin(picture.id, at, wanted.model, wanted.steps, now, pixels=pixels, low=low)
        self._pictures[picture.number] = picture
        device = self._devices[at]
        device.using[wanted.model] += 1
        if wanted.model in device.models:
            self._start(picture)
            return
        waiting = self._loading[at, wanted.model]
        waiting.append(picture)
        self._events.after(0, lambda: self._queue.place(picture.ticket, False))  # not within the queue's own call
        if len(waiting) == 1:
            self._events.after(self._times.load, lambda: self._loaded(at, wanted.model))

    def _loaded(self, at: int, model: str) -> None:
        device = self._devices[at]
        for other in sorted(device.models, key=device.models.__getitem__):
            if len(device.models) >= LOADED_MODELS and not device.using[other]:
                del device.models[other]
                self._router.unloaded(at, other)
        device.models[model] = self._events.now
        self._router.loaded(at, model, self._events.now)
        for picture in self._loading.pop((at, model)):
            self._queue.place(picture.ticket, True)
            self._start(picture)

    def _start(self, picture: _Picture) -> None:
        device = self._devices[picture.device]
        device.models[picture.wanted.model] = self._events.now
        device.enter(picture)
        device.park(picture, next(picture.kinds))
        device.beginning += 1
        if not device.busy:
            self._compute(device)

    def _compute(self, device: _Device) -> None:
        begin = device.beginning * self._times.begin
        device.beginning, device.busy = 0, True
        kind, group, seconds = device.next_pass(self._events.now)
        totals = self.totals
        if kind.denoises:
            totals.passes += 1
            totals.calls += len(group)
        totals.busy += begin + seconds
        self._events.after(begin + seconds, lambda: self._computed(device, kind, group))

    def _computed(self, device: _Device, kind: _Kind, group: list[Waiting]) -> None:
        now = self._events.now
        ended = []
        for call in group:
            picture = self._pictures[call.id]
            if kind.denoises:
                picture.left -= 1
                self._router.step(picture.id, picture.left, now)
            following = next(picture.kinds, None)
            if following is None:
                ended.append(picture)
            else:
                device.park(picture, following)
        between = len(group) * self._times.between[kind.name] + self._times.turn
        self.totals.busy += between
        self._events.after(between, lambda: self._go_on(device))
        for picture in ended:
            self._end(device, picture)

    def _go_on(self, device: _Device) -> None:
        device.busy = False
        if device.parked:
            self._compute(device)

    def _end(self, device: _Device, picture: _Picture) -> None:
        del self._pictures[picture.number]
        device.leave(picture)
        device.using[picture.wanted.model] -= 1
        self._router.end(picture.id)
        answered = self._events.now + self._times.end
        self.totals.answered(picture.wanted, answered, self._slack, self._times)
        self._on_answer(picture.wanted, answered - picture.wanted.at)
        self._queue.leave(picture.ticket, drawn=True)


# Simpler ways.


class Simple:
    """Whole requests on whole devices: the oldest waiting ones that are alike, at most `most`, from start to end.

    `most` 1 is first come, first served. A static batch has one model, size and number of steps, as a pipeline of
    diffusers draws them; it begins as soon as a device is free, with those that wait. Of free devices, one that has the
    model is taken.
    """

    def __init__(self, times: StepTimes, devices: int, *, slack: float, most: int) -> None:
        self._times, self._slack, self._most = times, slack, most
        self._free: dict[int, None] = dict.fromkeys(range(devices))
        self._models: list[deque[str]] = [deque(maxlen=LOADED_MODELS) for _ in range(devices)]
        self._waiting: dict[tuple[str, int, int], deque[Wanted]] = {}
        self._events = Events(())
        self.totals = Totals()

    def run(self, arrivals: Iterable[Wanted], loaded: Sequence[str] = ()) -> Totals:
        """`loaded`: as `Served` has it."""
        for at, models in enumerate(self._models):
            models.extend(_at_first(loaded, at))
        self._events = Events(arrivals)
        self._events.run(self._arrive)
        return self.totals

    def _arrive(self, wanted: Wanted) -> None:
        self._waiting.setdefault((wanted.model, wanted.side, wanted.steps), deque()).append(wanted)
        if self._free:
            self._begin()

    def _begin(self) -> None:
        kind = min(self._waiting, key=lambda each: self._waiting[each][0].at)
        line = self._waiting[kind]
        group = [line.popleft() for _ in range(min(self._most, len(line)))]
        if not line:
            del self._waiting[kind]
        model, side, steps = kind
        has = (device for device in self._free if model in self._models[device])
        device = next(has, next(iter(self._free)))
        del self._free[device]
        seconds, count = 0.0, len(group)
        if model not in self._models[device]:
            self._models[device].append(model)
            seconds += self._times.load
        seconds += self._times.together(side, steps, count)
        self.totals.busy += seconds
        self.totals.passes += steps
        self.totals.calls += steps * count
        self._events.after(seconds, lambda: self._end(device, group))

    def _end(self, device: int, group: list[Wanted]) -> None:
        for wanted in group:
            self.totals.answered(wanted, self._events.now + self._times.end, self._slack, self._times)
        self._free[device] = None
        if self._waiting:
            self._begin()
