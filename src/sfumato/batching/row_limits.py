"""Maximum rows of a forward pass: the setting, or less where more ran out of memory or do not pay."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from sfumato.batching.calls import Call
from sfumato.batching.forward_times import ForwardTimes, shape


class RowLimits:
    """The limit `max_rows`, and lower limits for single modules and shapes."""

    def __init__(self, max_rows: int, times: ForwardTimes) -> None:
        """`times`: of forward passes, by `shape`."""
        self._max_rows = max_rows
        self._times = times
        self.lowered: dict[Hashable, int] = {}

    def of(self, call: Call) -> int:
        """The limit for forward passes of this module and shape."""
        of = shape(call)
        return self._times.limit(of, min(self._max_rows, self.lowered.get(of, self._max_rows)))

    def halve(self, calls: Sequence[Call]) -> int:
        """The rows of `calls` did not fit into memory: halve and return the limit for their module and shape."""
        limit = max(1, sum(call.rows for call in calls) // 2)
        self.lowered[shape(calls[0])] = limit
        return limit

    def clear(self) -> None:
        self.lowered.clear()
