"""What the clock decides of a request: its time limit, and its deadline."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from types import TracebackType

from sfumato.core import Done
from sfumato.errors import DeadlineExceeded, TimedOut

REMEDY = "request fewer steps or a smaller size"


class DrawingTime(AbstractAsyncContextManager["DrawingTime"]):
    """Ends what is done inside once one picture was drawn for `limit_s` seconds; None: never.

    For pictures of stored requests, which may wait for hours behind others. Time counts from when the engine begins
    with it (`count(True)`), without that in which its model is loaded (`count(False)`).
    """

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._left_s = math.inf if limit_s is None else limit_s
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> DrawingTime:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise TimedOut(f"drawn for {self._limit_s} s without an end (the setting time_limit_s): {REMEDY}") from None

    def count(self, counting: bool) -> None:
        """Whether time counts from now on."""
        ends, now = self._timeout.when(), asyncio.get_running_loop().time()
        if math.isinf(self._left_s) or counting is (ends is not None) or self._timeout.expired():
            return
        if ends is not None:
            self._left_s = max(0.0, ends - now)
        self._timeout.reschedule(now + self._left_s if counting else None)


async def refuse_late(turn: asyncio.Event, left_s: float) -> None:
    """Returns at the first picture's turn. Raises DeadlineExceeded if that does not come in time."""
    try:
        async with asyncio.timeout(left_s):
            await turn.wait()
    except TimeoutError:
        raise DeadlineExceeded(
            "x-deadline-ms: it has passed while the request waited in the queue, and nothing of it is drawn; send a "
            "later one, or none",
            param="x-deadline-ms",
        ) from None


def saying_if_late(done: Done, deadline: float | None) -> Done:
    """With a warning if it was ready after its deadline."""
    late_s = time.time() - (math.inf if deadline is None else deadline)
    if late_s <= 0:
        return done
    return replace(done, warnings=(*done.warnings, f"deadline: the picture was ready {late_s:.1f} s after it"))
