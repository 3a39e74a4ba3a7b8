"""What each caller has had of the forwards, so that who has had least can go first.

The line in front of the engine (`serving/queue.py`) is fair in another way: it shares out places, and one caller may
have all but one of them. This shares out the forwards among those who have places.
"""

from __future__ import annotations

from collections.abc import Iterable


class FairShare:
    """Rows that were computed for each caller, of those that draw now."""

    def __init__(self) -> None:
        self._rows: dict[str, float] = {}

    def enter(self, caller: str, beside: Iterable[str]) -> None:
        """A request of `caller` begins beside those of others. Who comes back after a while has not saved up turns."""
        least = min((self._rows[other] for other in beside if other in self._rows), default=0.0)
        self._rows[caller] = max(self._rows.get(caller, 0.0), least)

    def add(self, caller: str, rows: int) -> None:
        self._rows[caller] = self._rows.get(caller, 0.0) + rows

    def of(self, caller: str) -> float:
        return self._rows.get(caller, 0.0)

    def clear(self) -> None:
        self._rows.clear()
