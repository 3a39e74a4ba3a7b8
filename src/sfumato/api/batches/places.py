"""Places of a number that changes: `asyncio.Semaphore` has a fixed one."""

from __future__ import annotations

import asyncio
from collections import deque


class Places:
    """So many may be held at a time; whoever waits first gets the next one."""

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Wait for a place."""
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._serve()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it came at the same moment
                self.give()
            raise

    def give(self) -> None:
        """Give one back."""
        self._free += 1
        self._serve()

    def resize(self, count: int) -> None:
        """Those that are held stay, be they more."""
        self._free += count - self._count
        self._count = count
        self._serve()

    def _serve(self) -> None:
        while self._free > 0 and self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                self._free -= 1
                place.set_result(None)
