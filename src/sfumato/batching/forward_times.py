"""How long forward passes take, by module, shape and rows: what batching gains, and what it costs one request.

Measured on those that requests need anyway. Only which calls share a forward pass depends on it, never a picture.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from sfumato.batching.calls import Call
from sfumato.batching.interruption import METHODS

KEPT = 5
"""Latest forward passes of a number of rows that count; the fastest is the least disturbed by other load."""

ENOUGH = 3
"""Forward passes of a number of rows that it takes to compare it with others."""

WORTH = 1.03
"""More rows must compute this many times as many rows in a second."""

SHORTEST_S = 0.5
"""Forward passes on a host that take less are not worth comparing: its other load disturbs them more."""

ANEW = 64
"""After so many forward passes the rows that did not pay are tried again."""

BEARABLE = 1.25
"""A short request takes others along while its forward pass takes at most this many times as long as alone."""

SHARE = 0.05
"""Part of the time that may be lost with fewer rows than there could have been, so that a short request is fast."""

MOST_S = 30.0
"""Maximum time saved up for that."""


@dataclass(slots=True)
class _Shape:
    """Times of forward passes of one module and shape."""

    forwards: int = 0
    seconds: dict[int, deque[float]] = field(default_factory=dict)
    """Number of rows → the latest times."""
    fastest: dict[int, float] = field(default_factory=dict)
    """Number of rows → the shortest of these."""
    limits: dict[int, int] = field(default_factory=dict)
    """Most rows → the limit below them, as long as the times say the same."""
    on_host: bool = True


class ForwardTimes:
    """Times of the latest forward passes, and what may be lost for short requests."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock`: seconds."""
        self._clock = clock
        self._shapes: dict[Hashable, _Shape] = {}
        self._on_device: deque[tuple[Any, Any, Hashable, int]] = deque()
        """Forward passes that an accelerator may not have computed yet: events before and after."""
        self.saved_s = 0.0
        """Time that may be lost for short requests."""

    def begin(self, call: Call) -> Any:
        """A forward pass begins, with `call` in it. Returns what `end` takes; None: it is not measured.

        Others compute within a long call, so it is not measured. What the host's clock says of an accelerator means
        nothing: events say it, and nothing waits for them.
        """
        device = _device(call)
        if call.key is None or call.method in METHODS or device is None:
            return None
        if device.type == "cpu":
            return self._clock()
        return _event(device) if device.type == "cuda" else None

    def end(self, begun: Any, call: Call, rows: int) -> None:
        """It has ended, with so many rows."""
        device = _device(call)
        if begun is None or device is None:
            return
        if isinstance(begun, float):
            self.note(shape(call), rows, self._clock() - begun)
            return
        self._on_device.append((begun, _event(device), shape(call), rows))
        while self._on_device and self._on_device[0][1].query():
            before, after, of, count = self._on_device.popleft()
            self.note(of, count, before.elapsed_time(after) / 1e3, on_host=False)

    def note(self, shape: Hashable, rows: int, seconds: float, *, on_host: bool = True) -> None:
        if seconds <= 0:  # shorter than the clock can tell
            return
        entry = self._shapes.setdefault(shape, _Shape(on_host=on_host))
        entry.forwards += 1
        times = entry.seconds.setdefault(rows, deque(maxlen=KEPT))
        times.append(seconds)
        fastest = min(times)
        if fastest != entry.fastest.get(rows) or len(times) == ENOUGH:
            entry.fastest[rows] = fastest
            entry.limits.clear()
        self.saved_s = min(MOST_S, self.saved_s + SHARE * seconds)

    def limit(self, shape: Hashable, most: int) -> int:
        """The rows, up to `most`, beyond which more rows take as long as one after another."""
        entry = self._shapes.get(shape)
        if entry is None or entry.forwards % ANEW == 0:
            return most
        if most not in entry.limits:
            entry.limits[most] = self._limit(entry, most)
        return entry.limits[most]

    @staticmethod
    def _limit(entry: _Shape, most: int) -> int:
        rates = {
            rows: rows / entry.fastest[rows]
            for rows, times in entry.seconds.items()
            if rows <= most and len(times) >= ENOUGH
        }
        if len(rates) < 2 or (entry.on_host and entry.fastest[min(rates)] < SHORTEST_S):
            return most
        best = max(rates.values())
        limit = min(rows for rows, rate in rates.items() if rate * WORTH >= best)
        return limit if limit < max(rates) else most

    def bearable(self, shape: Hashable, rows: int, most: int) -> int:
        """The rows, from `rows` to `most`, of a forward pass that a short request of `rows` rows leads.

        `most` if too much time was lost for short requests lately, or if it is not known to pay.
        """
        if not self._long(shape):
            return most
        alone, together = self._expected(shape, rows), self._expected(shape, most)
        if alone is None or together is None:
            return rows if self.saved_s > 0 else most
        if self.saved_s < alone - together * rows / most:
            return most
        return self._bearable(shape, alone, rows, most)

    def rides(self, shape: Hashable, rows: int, most: int) -> int:
        """The rows, from `rows` to `most`, of a forward pass for interactive requests that those of low priority fill.

        What takes longer than is bearable is not theirs to take, however much it would compute. A number of rows that
        is larger than all that were measured is tried, and measured by that.
        """
        alone, together = self._expected(shape, rows), self._expected(shape, most)
        if alone is None:
            return rows
        return most if together is None else self._bearable(shape, alone, rows, most)

    def _bearable(self, shape: Hashable, alone: float, rows: int, most: int) -> int:
        return max(
            (more for more in range(rows, most + 1) if (self._expected(shape, more) or 0.0) <= BEARABLE * alone),
            default=rows,
        )

    def _long(self, shape: Hashable) -> bool:
        """Whether forward passes take long enough to tell them from other load."""
        entry = self._shapes.get(shape)
        if entry is None or not entry.on_host:
            return entry is not None
        known = (entry.fastest[rows] for rows, times in entry.seconds.items() if len(times) >= ENOUGH)
        return max(known, default=0.0) >= SHORTEST_S

    def lose(self, shape: Hashable, rows: int, most: int) -> None:
        """A forward pass has `rows` rows and could have had `most`."""
        alone, together = self._expected(shape, rows), self._expected(shape, most)
        if alone is not None:
            self.saved_s -= max(0.0, alone - (alone if together is None else together * rows / most))

    def clear(self) -> None:
        self._shapes.clear()
        self._on_device.clear()

    def _expected(self, shape: Hashable, rows: int) -> float | None:
        """Seconds of a forward pass of so many rows, in between those that were measured; None if it lies outside."""
        entry = self._shapes.get(shape)
        known = entry.fastest if entry else {}
        if rows in known:
            return known[rows]
        below = max((count for count in known if count <= rows), default=None)
        above = min((count for count in known if count >= rows), default=None)
        if below is None or above is None:
            return None
        return known[below] + (known[above] - known[below]) * (rows - below) / (above - below)


def shape(call: Call) -> Hashable:
    """Module, what computes it, and shapes, without rows and contents."""
    shapes = [(leaf.path, leaf.value.shape[1:]) for leaf in call.leaves if leaf.kind in ("rows", "multi", "ragged")]
    return (id(call.module), call.method, call.runner.number if call.runner else 0, tuple(shapes))


def _event(device: torch.device) -> Any:
    """An event of that device, which need not be the current one."""
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
    return event


def _device(call: Call) -> torch.device | None:
    return next((leaf.value.device for leaf in call.leaves if isinstance(leaf.value, torch.Tensor)), None)
