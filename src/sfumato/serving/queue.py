"""The queue: bounded, and fair between callers.

Next is the waiting caller with the fewest pictures in flight, then the one served longest ago; for one
caller, first come, first served. The last free place is reserved for a caller with nothing in flight, so a
single picture does not have to wait for another caller's hundred.

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
from collections.abc import Hashable, Sequence
from typing import TypeVar

from sfumato.errors import TooManyRequests

_K = TypeVar("_K", bound=Hashable)

MAX_RETRY_AFTER_S = 120
"""OpenAI's clients give up on longer ones."""

FIRST_GUESS_S = 10.0
"""Assumed time per picture before the first one was drawn."""

SHARE = 4
"""A caller with nothing in a full queue may still add 1/SHARE of its limit, until it is twice as long."""

WEIGHT = 0.2
"""Weight of the latest picture in the running mean of the time per picture."""


class Ticket:
    """A place in the queue for one picture."""

    def __init__(self, caller: str, number: int, model: str = "") -> None:
        self.caller = caller
        self.model = model
        self.number = number
        """Tickets are numbered in order of arrival."""
        self.called = asyncio.Event()
        self.since: float | None = None
        """When its turn began, in seconds of the monotonic clock."""
        self.placed = False
        """Whether it takes a place; not while its model is loaded."""


class Queue:
    """`places` pictures are drawn at a time and `limit` may wait; requests beyond that are refused."""

    def __init__(self, places: int, limit: int) -> None:
        self._places = places
        self._limit = limit
        self._lines: dict[str, dict[Ticket, None]] = {}
        """Caller → its waiting tickets in order of arrival; only callers that have any."""
        self._unready: dict[str, dict[Ticket, None]] = {}
        """The same for tickets that must not be called yet: their pictures are being fetched."""
        self._waiting = 0
        self._in_flight: Counter[str] = Counter()
        self._running = 0
        self._of_model: Counter[tuple[str, str]] = Counter()
        """Caller and model → its pictures in flight."""
        self._aside: Counter[tuple[str, str]] = Counter()
        """Caller and model → its pictures that were called but take no place, as the model is being loaded."""
        self._served: dict[str, int] = {}
        """Caller → number of turns begun when it last got one; only callers waiting or in flight."""
        self._turns = 0
        self._numbers = 0
        self._mean: float | None = None
        self._positions: dict[Ticket, int] | None = None
        """Cached positions of all waiting tickets, until the queue changes."""

    @property
    def places(self) -> int:
        return self._places

    def resize(self, places: int) -> None:
        """From now on so many pictures are drawn at a time. Those in flight stay, be they more."""
        self._places = places
        self._call()

    @property
    def waiting(self) -> int:
        """Pictures that wait for their turn, or for the load of their model."""
        return self._waiting + self._aside.total()

    @property
    def running(self) -> int:
        return self._running

    @property
    def mean_s(self) -> float | None:
        """Recent mean time from a picture's turn to its end, in seconds; None before the first."""
        return self._mean

    def join(self, caller: str, count: int, *, model: str = "", ready: bool = True) -> list[Ticket]:
        """Returns `count` new tickets. Raises TooManyRequests if the queue has no room for them.

        Tickets that are not `ready` are skipped until `release`.
        """
        room = self._limit + self._free(caller)
        if caller not in self._lines and caller not in self._unready and count <= max(1, self._limit // SHARE):
            room += self._limit  # others have filled the queue; a caller with nothing in it still gets some room
        if self.waiting + count > room:
            raise TooManyRequests(
                f"{self.waiting} pictures are waiting already; the limit is {self._limit} (the setting max_queue). "
                "Try again later.",
                retry_after=self.retry_after(),
            )
        tickets = [Ticket(caller, self._numbers + i, model) for i in range(count)]
        self._numbers += count
        lines = self._lines if ready else self._unready
        lines.setdefault(caller, {}).update(dict.fromkeys(tickets))
        self._waiting += count
        self._call()
        return tickets

    def release(self, tickets: Sequence[Ticket]) -> None:
        """Allow these tickets to be called; they keep the place they got on arrival."""
        for ticket in tickets:
            if ticket in self._unready.get(ticket.caller, ()):
                self._take(ticket)
                self._waiting += 1
                line = self._lines.setdefault(ticket.caller, {})
                in_order = not line or next(reversed(line)).number < ticket.number
                line[ticket] = None
                if not in_order:
                    self._lines[ticket.caller] = dict.fromkeys(sorted(line, key=lambda each: each.number))
        self._call()

    def leave(self, ticket: Ticket, *, drawn: bool) -> None:
        """End a ticket, waiting or in flight; `drawn`: with a picture. May be called more than once."""
        if ticket in self._lines.get(ticket.caller, ()) or ticket in self._unready.get(ticket.caller, ()):
            self._take(ticket)
        elif ticket.since is not None:
            if drawn:
                took = time.monotonic() - ticket.since
                self._mean = took if self._mean is None else self._mean + WEIGHT * (took - self._mean)
            ticket.since = None
            if ticket.placed:
                self._count(ticket, False)
            else:
                _add(self._aside, (ticket.caller, ticket.model), -1)
        else:
            return
        self._call()
        of_callers = (self._lines, self._unready, self._in_flight, {caller for caller, _ in self._aside})
        if not any(ticket.caller in each for each in of_callers):
            self._served.pop(ticket.caller, None)

    def place(self, ticket: Ticket, placed: bool) -> None:
        """A called picture takes a place, or none while its model is loaded. Those that return may be too many."""
        if ticket.since is None or ticket.placed == placed:
            return
        if placed:
            ticket.since = time.monotonic()  # the load is no time of drawing
        self._count(ticket, placed)
        _add(self._aside, (ticket.caller, ticket.model), -1 if placed else 1)
        self._call()

    def _count(self, ticket: Ticket, placed: bool) -> None:
        more = 1 if placed else -1
        ticket.placed = placed
        self._running += more
        _add(self._in_flight, ticket.caller, more)
        _add(self._of_model, (ticket.caller, ticket.model), more)

    def position(self, ticket: Ticket) -> int:
        """Turns until its own, if no other arrives: 1 is next; 0: its turn has come, or it is not ready."""
        if self._positions is None:
            self._positions = self._simulated_positions()
        return self._positions.get(ticket, 0)

    def wait_s(self, position: int) -> float | None:
        """Estimated seconds until this many turns have passed; None if no picture was drawn yet."""
        return None if self._mean is None else position * self._mean / self._places

    def _free(self, caller: str) -> int:
        """Places that this caller may take now; the last one is reserved for callers without any."""
        free = max(0, self._places - self.running)
        return free if self._places == 1 or (free == 1 and not self._in_flight[caller]) else max(0, free - 1)

    def _call(self) -> None:
        """Notify the tickets whose turn has come."""
        self._positions = None
        while self._running < self._places and (lines := self._callable()):
            caller = min(lines, key=lambda each: self._rank(each, lines[each][0]))
            last = self._running == self._places - 1
            if last and self._in_flight[caller] and self._places > 1:
                return
            ticket = lines[caller][0]
            self._take(ticket)
            self._turns += 1
            self._count(ticket, True)
            self._served[caller] = self._turns
            ticket.since = time.monotonic()
            ticket.called.set()

    def _callable(self) -> dict[str, list[Ticket]]:
        """Caller → its tickets that may be called, in order; only callers that have any."""
        most = max(1, self._places - 1)
        full = {each for each, count in self._aside.items() if count + self._of_model[each] >= most}
        lines = {
            caller: [ticket for ticket in line if (caller, ticket.model) not in full]
            for caller, line in self._lines.items()
        }
        return {caller: line for caller, line in lines.items() if line}

    def _take(self, ticket: Ticket) -> None:
        """Remove a ticket from the queue."""
        lines = self._lines if ticket in self._lines.get(ticket.caller, ()) else self._unready
        del lines[ticket.caller][ticket]
        if not lines[ticket.caller]:
            del lines[ticket.caller]
        self._waiting -= 1

    def _rank(self, caller: str, ticket: Ticket) -> tuple[int, int, int]:
        """Sort key of a caller whose next ticket this is; the smallest is next."""
        return self._in_flight[caller], self._served.get(caller, 0), ticket.number

    def _simulated_positions(self) -> dict[Ticket, int]:
        """The positions of all tickets, by simulating `_call` with a heap of callers."""
        lines = {caller: iter(line) for caller, line in self._callable().items()}
        first = {caller: next(line) for caller, line in lines.items()}
        heap = [(self._rank(caller, ticket), caller, ticket) for caller, ticket in first.items()]
        heapq.heapify(heap)
        positions: dict[Ticket, int] = {}
        while heap:
            (in_flight, _, _), caller, ticket = heap[0]
            positions[ticket] = len(positions) + 1
            following = next(lines[caller], None)
            if following is None:
                heapq.heappop(heap)
            else:
                rank = (in_flight + 1, self._turns + len(positions), following.number)
                heapq.heapreplace(heap, (rank, caller, following))
        return positions

    def retry_after(self) -> int:
        """Seconds after which a refused caller may retry, 1 .. MAX_RETRY_AFTER_S."""
        seconds = (self._waiting + 1) * (self._mean or FIRST_GUESS_S) / self._places
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(seconds)))


def _add(counter: Counter[_K], key: _K, more: int) -> None:
    """Counters have only what they count more than none of."""
    counter[key] += more
    if not counter[key]:
        del counter[key]
