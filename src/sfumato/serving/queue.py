"""The queue: bounded, and fair between callers.

Next is the waiting caller with the fewest pictures in flight, then the one served longest ago; for one
caller, first come, first served, or what is due first. The last free place is reserved for a caller with nothing in
flight, so a single picture does not have to wait for another caller's hundred.

Pictures of low priority stand in lines of their own, and have places of their own (`policy.low_places`): they take none
of the others', which wait for none of them. They are called when no other picture waits and a place is free; and one
always, so that they go on however many others come.

A picture whose model is being loaded takes no place: the engine says so, and when it has one again. Of one caller and
model, no more of them leave the queue than it may have in flight; the others wait in it until some have places again.
Those that left it are with the engine already and draw when the load has ended, so more than `places` may be in flight
then: for each caller and load, by at most all places but one.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from sfumato.batching.policy import low_places
from sfumato.errors import InvalidRequest, TooManyRequests

_K = TypeVar("_K", bound=Hashable)

MAX_RETRY_AFTER_S = 120
"""OpenAI's clients give up on longer ones."""

FIRST_GUESS_S = 10.0
"""Assumed time per picture before the first one was drawn."""

SHARE = 4
"""A caller with nothing in a full queue may still add 1/SHARE of its limit, until it is twice as long."""

WEIGHT = 0.2
"""Weight of the latest picture in the running mean of the time per picture."""


UNHURRIED_S = 120.0
"""A picture without a deadline stands in its caller's line as if it were due so long after its arrival, and one with a
later deadline too. So deadlines overtake, and nobody is overtaken for longer than that."""


class Line(NamedTuple):
    """Where a caller's pictures of one class wait."""

    low: bool
    caller: str


class Ticket:
    """A place in the queue for one picture."""

    def __init__(self, line: Line, number: int, model: str = "", due: float = 0.0) -> None:
        self.line = line
        self.model = model
        self.number = number
        """Tickets are numbered in order of arrival."""
        self.due = due
        """When it should be called, in seconds of the queue's clock."""
        self.called = asyncio.Event()
        self.since: float | None = None
        """When its turn began, in seconds of the queue's clock."""
        self.placed = False
        """Whether it takes a place; not while its model is loaded."""

    @property
    def order(self) -> tuple[float, int]:
        """Sort key within its line."""
        return self.due, self.number


class Queue:
    """`places` pictures are drawn at a time and `limit` may wait; requests beyond that are refused."""

    def __init__(self, places: int, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds."""
        self._places = {False: places, True: low_places(places)}
        self._limit = limit
        self._clock = clock
        self._lines: dict[Line, dict[Ticket, None]] = {}
        """Its waiting tickets, the next one first; only lines that have any."""
        self._unready: dict[Line, dict[Ticket, None]] = {}
        """The same for tickets that must not be called yet: their pictures are being fetched."""
        self._waiting: Counter[bool] = Counter()
        """Whether of low priority → tickets in `_lines` and `_unready`."""
        self._in_flight: Counter[Line] = Counter()
        self._running: Counter[bool] = Counter()
        self._of_model: Counter[tuple[Line, str]] = Counter()
        """Line and model → its pictures in flight."""
        self._aside: Counter[tuple[Line, str]] = Counter()
        """Line and model → its pictures that were called but take no place, as the model is being loaded."""
        self._served: dict[Line, int] = {}
        """Line → number of turns begun when it last got one; only lines waiting or in flight."""
        self._turns = 0
        self._numbers = 0
        self._means: dict[bool, float] = {}
        self._positions: dict[Ticket, int] | None = None
        """Cached positions of all waiting tickets, until the queue changes."""

    @property
    def places(self) -> int:
        return self._places[False]

    def resize(self, places: int) -> None:
        """From now on so many pictures are drawn at a time. Those in flight stay, be they more."""
        self._places = {False: places, True: low_places(places)}
        self._call()

    @property
    def waiting(self) -> int:
        """Pictures that wait for their turn, or for the load of their model."""
        return self._waiting.total() + self._aside.total()

    def waiting_of(self, low: bool) -> int:
        """Those of one class."""
        return self._waiting[low] + sum(count for (line, _), count in self._aside.items() if line.low is low)

    @property
    def running(self) -> int:
        return self._running.total()

    def running_of(self, low: bool) -> int:
        """Those of one class."""
        return self._running[low]

    def mean_s(self, low: bool = False) -> float | None:
        """Recent mean time from a picture's turn to its end, in seconds; None before the first."""
        return self._means.get(low, self._means.get(not low))

    def join(
        self,
        caller: str,
        count: int,
        *,
        model: str = "",
        ready: bool = True,
        low: bool = False,
        due_in_s: float = math.inf,
    ) -> list[Ticket]:
        """Returns `count` new tickets. Raises TooManyRequests if the queue has no room for them, and InvalidRequest if
        it never has.

        Tickets that are not `ready` are skipped until `release`. `low`: of low priority. `due_in_s`: seconds until its
        deadline.
        """
        line = Line(low, caller)
        places = self._places[low]
        if count > (most := self._limit + max(1, places - 1)):
            raise InvalidRequest(
                f"n: {count} pictures in one request never have room; at most {most} do (the settings max_queue and "
                "max_active). Send fewer at a time.",
                param="n",
            )
        waiting = self.waiting if low else self.waiting_of(False)  # no interactive one is refused for others
        room = self._limit + self._free(line)
        if line not in self._lines and line not in self._unready and count <= max(1, self._limit // SHARE):
            room += self._limit  # others have filled the queue; a caller with nothing in it still gets some room
        if waiting + count > room:
            raise TooManyRequests(
                f"{waiting} pictures are waiting already; the limit is {self._limit} (the setting max_queue). "
                "Try again later.",
                retry_after=self.retry_after(low),
            )
        due = self._clock() + min(due_in_s, UNHURRIED_S)
        tickets = [Ticket(line, self._numbers + i, model, due) for i in range(count)]
        self._numbers += count
        _insert(self._lines if ready else self._unready, line, tickets)
        self._waiting[low] += count
        self._call()
        return tickets

    def release(self, tickets: Sequence[Ticket]) -> None:
        """Allow these tickets to be called; they keep the place they got on arrival."""
        for ticket in tickets:
            if ticket in self._unready.get(ticket.line, ()):
                self._take(ticket)
                self._waiting[ticket.line.low] += 1
                _insert(self._lines, ticket.line, [ticket])
        self._call()

    def leave(self, ticket: Ticket, *, drawn: bool) -> None:
        """End a ticket, waiting or in flight; `drawn`: with a picture. May be called more than once."""
        line = ticket.line
        if ticket in self._lines.get(line, ()) or ticket in self._unready.get(line, ()):
            self._take(ticket)
        elif ticket.since is not None:
            if drawn:
                took = self._clock() - ticket.since
                mean = self._means.get(line.low, took)
                self._means[line.low] = mean + WEIGHT * (took - mean)
            ticket.since = None
            if ticket.placed:
                self._count(ticket, False)
            else:
                _add(self._aside, (line, ticket.model), -1)
        else:
            return
        self._call()
        of_lines = (self._lines, self._unready, self._in_flight, {line for line, _ in self._aside})
        if not any(line in each for each in of_lines):
            self._served.pop(line, None)

    def place(self, ticket: Ticket, placed: bool) -> None:
        """A called picture takes a place, or none while its model is loaded. Those that return may be too many."""
        if ticket.since is None or ticket.placed == placed:
            return
        if placed:
            ticket.since = self._clock()  # the load is no time of drawing
        self._count(ticket, placed)
        _add(self._aside, (ticket.line, ticket.model), -1 if placed else 1)
        self._call()

    def _count(self, ticket: Ticket, placed: bool) -> None:
        more = 1 if placed else -1
        ticket.placed = placed
        self._running[ticket.line.low] += more
        _add(self._in_flight, ticket.line, more)
        _add(self._of_model, (ticket.line, ticket.model), more)

    def position(self, ticket: Ticket) -> int:
        """Turns until its own, if no other arrives: 1 is next; 0: its turn has come, or it is not ready.

        Of low priority: if all others have their turns before. Its own may come sooner.
        """
        if self._positions is None:
            self._positions = self._simulated_positions()
        return self._positions.get(ticket, 0)

    def wait_s(self, position: int, *, low: bool = False) -> float | None:
        """Estimated seconds until this many turns have passed; None if no picture was drawn yet."""
        mean, others = self.mean_s(low), min(position, self._waiting[False]) if low else 0
        if mean is None:
            return None
        before = (self.wait_s(others) or 0.0) if others else 0.0
        return before + (position - others) * mean / self._places[low]

    def _free(self, line: Line) -> int:
        """Places that this line may take now; the last one is reserved for lines without any."""
        places = self._places[line.low]
        free = max(0, places - self._running[line.low])
        return free if places == 1 or (free == 1 and not self._in_flight[line]) else max(0, free - 1)

    def _call(self) -> None:
        """Notify the tickets whose turn has come."""
        self._positions = None
        for low in (False, True):
            while ticket := self._next(low):
                self._take(ticket)
                self._turns += 1
                self._count(ticket, True)
                self._served[ticket.line] = self._turns
                ticket.since = self._clock()
                ticket.called.set()

    def _next(self, low: bool) -> Ticket | None:
        """The ticket of this class whose turn has come, if any."""
        running, places = self._running[low], self._places[low]
        if running >= places or not self._waiting[low]:
            return None
        if low and running and (self._running.total() >= self._places[False] or any(self._first(False))):
            return None
        ticket = min(self._first(low), key=self._rank, default=None)
        if ticket and running == places - 1 and self._in_flight[ticket.line] and places > 1:
            return None
        return ticket

    def _first(self, low: bool) -> Iterator[Ticket]:
        """The next ticket of each line of this class that may be called."""
        full = self._full()
        for line, tickets in self._lines.items():
            if line.low is low and (first := next(_callable(tickets, full), None)):
                yield first

    def _full(self) -> set[tuple[Line, str]]:
        """Lines and models of which no more are called while the model is loaded."""
        return {
            (line, model)
            for (line, model), count in self._aside.items()
            if count + self._of_model[line, model] >= max(1, self._places[line.low] - 1)
        }

    def _take(self, ticket: Ticket) -> None:
        """Remove a ticket from the queue."""
        lines = self._lines if ticket in self._lines.get(ticket.line, ()) else self._unready
        del lines[ticket.line][ticket]
        if not lines[ticket.line]:
            del lines[ticket.line]
        self._waiting[ticket.line.low] -= 1

    def _rank(self, ticket: Ticket) -> tuple[int, int, float, int]:
        """Sort key of a line whose next ticket this is, among those of its class; the smallest is next."""
        return self._in_flight[ticket.line], self._served.get(ticket.line, 0), *ticket.order

    def _simulated_positions(self) -> dict[Ticket, int]:
        """The positions of all tickets, by simulating `_call` with a heap of lines."""
        full, positions = self._full(), dict[Ticket, int]()
        for low in (False, True):
            lines = {line: _callable(waiting, full) for line, waiting in self._lines.items() if line.low is low}
            first = [ticket for waiting in lines.values() if (ticket := next(waiting, None))]
            heap = [(self._rank(ticket), ticket) for ticket in first]
            heapq.heapify(heap)
            while heap:
                (in_flight, *_), ticket = heap[0]
                positions[ticket] = len(positions) + 1
                following = next(lines[ticket.line], None)
                if following is None:
                    heapq.heappop(heap)
                else:
                    rank = (in_flight + 1, self._turns + len(positions), *following.order)
                    heapq.heapreplace(heap, (rank, following))
        return positions

    def retry_after(self, low: bool = False) -> int:
        """Seconds after which a refused caller may retry, 1 .. MAX_RETRY_AFTER_S."""
        waiting = self._waiting.total() if low else self._waiting[False]
        seconds = (waiting + 1) * (self.mean_s(low) or FIRST_GUESS_S) / self._places[low]
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(seconds)))


def _callable(tickets: dict[Ticket, None], full: set[tuple[Line, str]]) -> Iterator[Ticket]:
    """Those of a line that may be called, in order."""
    return (ticket for ticket in tickets if (ticket.line, ticket.model) not in full)


def _insert(lines: dict[Line, dict[Ticket, None]], line: Line, tickets: Sequence[Ticket]) -> None:
    """Put tickets into a line, each in its order."""
    there = lines.setdefault(line, {})
    in_order = not there or next(reversed(there)).order < tickets[0].order
    there.update(dict.fromkeys(tickets))
    if not in_order:
        lines[line] = dict.fromkeys(sorted(there, key=lambda each: each.order))


def _add(counter: Counter[_K], key: _K, more: int) -> None:
    """Counters have only what they count more than none of."""
    counter[key] += more
    if not counter[key]:
        del counter[key]
