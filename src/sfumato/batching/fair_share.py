"""Rows computed for each caller, so that the caller with the fewest can go first.

The queue before the engine (`serving/queue.py`) is fair in another way: it shares places in flight, and one caller may
have all but one of them. This shares forward passes among the callers that have places.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable


class FairShare:
    """Rows computed for each caller that has requests in flight. One with requests of two classes is two callers."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, float] = {}

    def enter(self, caller: Hashable, beside: Iterable[Hashable]) -> None:
        """A request of `caller` starts beside those of others. A caller that returns after a while has no credit."""
        minimum = min((self._rows[other] for other in beside if other in self._rows), default=0.0)
        self._rows[caller] = max(self._rows.get(caller, 0.0), minimum)

    def add(self, caller: Hashable, rows: int) -> None:
        self._rows[caller] = self._rows.get(caller, 0.0) + rows

    def of(self, caller: Hashable) -> float:
        return self._rows.get(caller, 0.0)

    def clear(self) -> None:
        self._rows.clear()
