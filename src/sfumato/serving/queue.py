"""Whose turn it is to draw: a bounded line, fair between callers.

Of those who wait the caller who holds the fewest places goes first, then the one who was served longest
ago; within a caller, who came first. The last free place is kept for a caller who has none, so whoever
asks for one picture beside somebody's hundred does not wait for any of them.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import Counter
from collections.abc import Sequence

from sfumato.errors import TooManyRequests

MAX_RETRY_AFTER_S = 120
"""Clients of OpenAI give up at longer ones."""

FIRST_GUESS_S = 10.0
"""What a picture takes, before one was drawn."""

SHARE = 4
"""A caller who has nothing in a full line may still add this part of its limit, until it is twice as long."""

WEIGHT = 0.2
"""Of the latest picture in the running mean of what a picture takes."""


class Ticket:
    """A place in the line for one picture."""

    def __init__(self, caller: str, number: int) -> None:
        self.caller = caller
        self.number = number
        """Tickets are numbered as they come."""
        self.called = asyncio.Event()
        self.since: float | None = None
        """When its turn began, in seconds of the monotonic clock."""


class Queue:
    """`places` pictures are drawn at a time and `limit` may wait; a request that would be beyond is refused."""

    def __init__(self, places: int, limit: int) -> None:
        self._places = places
        self._limit = limit
        self._lines: dict[str, dict[Ticket, None]] = {}
        """Caller → its tickets that wait, as they came; of callers that have any."""
        self._unready: dict[str, dict[Ticket, None]] = {}
        """The same of tickets that may not be called yet: their pictures are still fetched."""
        self._waiting = 0
        self._held: Counter[str] = Counter()
        self._running = 0
        self._served: dict[str, int] = {}
        """Caller → how many turns had begun when it last got one; of callers in the line or in a place."""
        self._turns = 0
        self._numbers = 0
        self._mean: float | None = None
        self._positions: dict[Ticket, int] | None = None
        """Of all that wait, until the line changes; None before somebody asks."""

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def running(self) -> int:
        return self._running

    @property
    def mean_s(self) -> float | None:
        """What a picture took lately from its turn to its end, in seconds; None before the first."""
        return self._mean

    def join(self, caller: str, count: int, *, ready: bool = True) -> list[Ticket]:
        """`count` tickets. Raises TooManyRequests when so many more may not wait.

        Those that are not `ready` are passed over until `release`.
        """
        room = self._limit + self._free(caller)
        if caller not in self._lines and caller not in self._unready and count <= max(1, self._limit // SHARE):
            room += self._limit  # others have filled the line; that is no reason to refuse who has nothing in it
        if self.waiting + count > room:
            raise TooManyRequests(
                f"{self.waiting} pictures wait already; at most {self._limit} may (the setting max_queue). "
                "Try again later.",
                retry_after=self.retry_after(),
            )
        tickets = [Ticket(caller, self._numbers + i) for i in range(count)]
        self._numbers += count
        lines = self._lines if ready else self._unready
        lines.setdefault(caller, {}).update(dict.fromkeys(tickets))
        self._waiting += count
        self._call()
        return tickets

    def release(self, tickets: Sequence[Ticket]) -> None:
        """They may be called from now on, by the place in the line that they have had since they came."""
        for ticket in tickets:
            if ticket in self._unready.get(ticket.caller, ()):
                self._take(ticket)
                self._waiting += 1
                line = self._lines.pop(ticket.caller, {}) | {ticket: None}
                self._lines[ticket.caller] = dict.fromkeys(sorted(line, key=lambda each: each.number))
        self._call()

    def leave(self, ticket: Ticket, *, drawn: bool) -> None:
        """It is done, whether its turn had come or not; `drawn`: with a picture. May be called again."""
        if ticket in self._lines.get(ticket.caller, ()) or ticket in self._unready.get(ticket.caller, ()):
            self._take(ticket)
        elif ticket.since is not None:
            if drawn:
                took = time.monotonic() - ticket.since
                self._mean = took if self._mean is None else self._mean + WEIGHT * (took - self._mean)
            ticket.since = None
            self._running -= 1
            self._held[ticket.caller] -= 1
            if not self._held[ticket.caller]:
                del self._held[ticket.caller]
        else:
            return
        self._call()
        if not any(ticket.caller in those for those in (self._lines, self._unready, self._held)):
            self._served.pop(ticket.caller, None)

    def position(self, ticket: Ticket) -> int:
        """How many turns until its own, if nobody else comes: 1 is the next; 0: it has come, or waits for pictures."""
        if self._positions is None:
            self._positions = self._foreseen()
        return self._positions.get(ticket, 0)

    def wait_s(self, position: int) -> float | None:
        """Seconds that this many turns take to come; None when no picture was drawn yet."""
        return None if self._mean is None else position * self._mean / self._places

    def _free(self, caller: str) -> int:
        """Places that this caller may take now; the last is for who has none."""
        left = self._places - self.running
        return left if self._places == 1 or (left == 1 and not self._held[caller]) else max(0, left - 1)

    def _call(self) -> None:
        """Whoever may draw now is told."""
        self._positions = None
        while self._lines and self._running < self._places:
            caller = min(self._lines, key=self._rank)
            last = self._running == self._places - 1
            if last and self._held[caller] and self._places > 1:
                return
            ticket = next(iter(self._lines[caller]))
            self._take(ticket)
            self._turns += 1
            self._running += 1
            self._held[caller] += 1
            self._served[caller] = self._turns
            ticket.since = time.monotonic()
            ticket.called.set()

    def _take(self, ticket: Ticket) -> None:
        """Out of the line."""
        lines = self._lines if ticket in self._lines.get(ticket.caller, ()) else self._unready
        del lines[ticket.caller][ticket]
        if not lines[ticket.caller]:
            del lines[ticket.caller]
        self._waiting -= 1

    def _rank(self, caller: str) -> tuple[int, int, int]:
        """Of a caller that waits; the least is the next."""
        return self._held[caller], self._served.get(caller, 0), next(iter(self._lines[caller])).number

    def _foreseen(self) -> dict[Ticket, int]:
        """The position of everybody: turns are given out as `_call` would, by a heap of callers."""
        lines = {caller: iter(line) for caller, line in self._lines.items()}
        heap = [(self._rank(caller), caller, next(lines[caller])) for caller in lines]
        heapq.heapify(heap)
        positions: dict[Ticket, int] = {}
        while heap:
            (held, _, _), caller, ticket = heap[0]
            positions[ticket] = len(positions) + 1
            following = next(lines[caller], None)
            if following is None:
                heapq.heappop(heap)
            else:
                rank = (held + 1, self._turns + len(positions), following.number)
                heapq.heapreplace(heap, (rank, caller, following))
        return positions

    def retry_after(self) -> int:
        """In how many seconds whoever is refused may come again, 1 .. MAX_RETRY_AFTER_S."""
        seconds = (self._waiting + 1) * (self._mean or FIRST_GUESS_S) / self._places
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(seconds)))
